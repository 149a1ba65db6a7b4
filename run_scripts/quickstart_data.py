"""Shipped text -> what pre-training reads, and sets of labelled sentences for `fairseq-qn train`.

    quickstart_data.py run_scripts/data/banking77 OUT

OUT, written anew, then holds train.tsv and valid.tsv, and pretrain/: the sentences as fairseq's masked LM
reads them, dict.txt, and model/sentencepiece.bpe.model, where `fairseq-qn train` looks for it.
"""

import os
import random
import shutil
import sys
from pathlib import Path

import sentencepiece
from fairseq import options
from fairseq_cli import preprocess

from fairseq_qn.interop.tsv import read_tsv

PIECES = 1000
LONGEST = 62  # pieces of a sentence: the model's 64 positions less <s> and </s>
VALID = 500  # training sentences held back

# A sentencepiece model carries its normalisation table; the built-in NFKC tables weigh 240 KB, more than
# half of the compressed model. Lower case and typewriter quotes are all that this text needs: 1 KB.
NORMALISE = {chr(c): chr(c + 32) for c in range(ord("A"), ord("Z") + 1)} | {
    "\u2019": "'",
    "\u2018": "'",
    "\u00a0": " ",
}


def split(source: Path, out: Path) -> dict[str, list[str]]:
    """Write train.tsv and valid.tsv, without sentences that the test set has too; return their sentences."""
    in_test = {row.sentences for row in read_tsv(source / "test.tsv")}
    rows = [row for row in read_tsv(source / "train.tsv") if row.sentences not in in_test]
    random.Random(1).shuffle(rows)
    sentences = {}
    for name, some in {"train": rows[VALID:], "valid": rows[:VALID]}.items():
        sentences[name] = [row.sentences[0] for row in some]
        lines = (f"{row.label}\t{row.sentences[0]}\n" for row in some)
        (out / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
    return sentences


def train_pieces(sentences: list[str], out: Path) -> sentencepiece.SentencePieceProcessor:
    """Train a unigram sentencepiece model and write it to out."""
    rules = Path("lower_case.tsv")
    here = Path.cwd()
    # the model keeps the path of the rules, and would that of an input file: no folder's name in it
    os.chdir(out.parent)
    try:
        rules.write_text("".join(f"{ord(a):X}\t{ord(b):X}\n" for a, b in sorted(NORMALISE.items())))
        with Path(out.name).open("wb") as writer:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=writer,
                vocab_size=PIECES,
                normalization_rule_tsv=str(rules),
                num_threads=1,  # more threads sum in another order: another model
                minloglevel=1,
            )
        rules.unlink()
    finally:
        os.chdir(here)
    return sentencepiece.SentencePieceProcessor(model_file=str(out))


def main(source: Path, out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)  # fairseq-preprocess refuses to overwrite a dictionary
    (out / "pretrain" / "model").mkdir(parents=True)
    sentences = split(source, out)
    model = train_pieces(sentences["train"], out / "pretrain" / "model" / "sentencepiece.bpe.model")
    command = ["--only-source", "--destdir", str(out / "pretrain"), "--workers", "1"]
    for name, some in sentences.items():
        # an empty line ends a document: with complete_doc no sample packs two sentences
        pieces = (model.encode(sentence, out_type=str)[:LONGEST] for sentence in some)
        text = "".join(" ".join(line) + "\n\n" for line in pieces)
        (out / f"{name}.pieces").write_text(text, encoding="utf-8")
        command += [f"--{name}pref", str(out / f"{name}.pieces")]
    preprocess.main(options.get_preprocessing_parser().parse_args(command))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
