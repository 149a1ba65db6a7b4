"""Shipped text -> what fairseq-train reads: a sentencepiece model, a dictionary and binarised sets.

    python run_scripts/quickstart_data.py run_scripts/data/banking77 OUT

OUT, written anew, then holds sentencepiece.bpe.model, pretrain/ (masked LM) and classify/ (sentence
prediction).
"""

import argparse
import csv
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import sentencepiece
from fairseq import options
from fairseq_cli import preprocess

Row = tuple[str, str]  # label, sentence

# A sentencepiece model carries its normalisation table; the built-in NFKC tables weigh 240 KB, more than
# half of the compressed model. Lower case and typewriter quotes are all that this text needs: 1 KB.
NORMALISE = {chr(c): chr(c + 32) for c in range(ord("A"), ord("Z") + 1)} | {
    "\u2019": "'",
    "\u2018": "'",
    "\u00a0": " ",
}


def read_rows(path: Path) -> list[Row]:
    """The (label, sentence) rows of a tab-separated file; newlines and runs of blanks inside a sentence
    become one.
    """
    with path.open(encoding="utf-8", newline="") as handle:
        rows = [
            (row[0], " ".join(row[1].split()))
            for row in csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)
        ]
    if not rows:
        raise SystemExit(f"{path}: no rows of label<TAB>sentence found")
    return rows


def split_rows(train: list[Row], test: list[Row], n_valid: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, valid): n_valid rows are held back at random, and sentences that the test set has too are
    dropped.
    """
    in_test = {sentence for _, sentence in test}
    rows = [row for row in train if row[1] not in in_test]
    random.Random(seed).shuffle(rows)
    return rows[n_valid:], rows[:n_valid]


def train_pieces(sentences: list[str], vocab_size: int, out: Path) -> sentencepiece.SentencePieceProcessor:
    """Trains a unigram sentencepiece model and writes it to out."""
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
                vocab_size=vocab_size,
                normalization_rule_tsv=str(rules),
                num_threads=1,  # more threads sum in another order: another model
                minloglevel=1,
            )
        rules.unlink()
    finally:
        os.chdir(here)
    return sentencepiece.SentencePieceProcessor(model_file=str(out))


def binarise(folder: Path, splits: dict[str, Path], dictionary: Path | None = None) -> None:
    """fairseq-preprocess on {split: text file}, without paying the import of fairseq for each call."""
    command = ["--only-source", "--destdir", str(folder), "--workers", "1"]
    command += [word for name, path in splits.items() for word in (f"--{name}pref", str(path))]
    command += ["--srcdict", str(dictionary)] if dictionary else []
    preprocess.main(options.get_preprocessing_parser().parse_args(command))


def write(path: Path, lines: list[str]) -> Path:
    """Writes lines of text and returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def prepare(source: Path, out: Path, vocab_size: int, max_pieces: int, n_valid: int, seed: int) -> str:
    """Writes everything, and returns one line of counts."""
    test = read_rows(source / "test.tsv")
    train, valid = split_rows(read_rows(source / "train.tsv"), test, n_valid, seed)
    out.mkdir(parents=True, exist_ok=True)
    model = train_pieces([sentence for _, sentence in train], vocab_size, out / "sentencepiece.bpe.model")
    sets = {}
    for name, rows in {"train": train, "valid": valid, "test": test}.items():
        sets[name] = [(label, model.encode(sentence, out_type=str)[:max_pieces]) for label, sentence in rows]
    # fairseq makes batches of neighbours and shuffles the batches: sorted by length (ties stay shuffled)
    # they need hardly any padding, which halves the time of an epoch
    sets["train"].sort(key=lambda row: len(row[1]))

    def text(kind: str, names: Iterable[str], form: Callable[[Any], str]) -> dict[str, Path]:
        return {
            name: write(out / "text" / f"{name}.{kind}", [form(row) for row in sets[name]]) for name in names
        }

    # an empty line ends a document: with `--sample-break-mode complete_doc` no sample packs two sentences
    spaced = text("spaced", ("train", "valid"), lambda row: " ".join(row[1]) + "\n")
    binarise(out / "pretrain", spaced)
    pieces = text("pieces", sets, lambda row: " ".join(row[1]))
    binarise(out / "classify" / "input0", pieces, out / "pretrain" / "dict.txt")
    binarise(out / "classify" / "label", text("label", sets, lambda row: row[0]))
    tokens = sum(len(row[1]) + 2 for row in sets["train"])
    return f"{len(train)} train, {len(valid)} valid, {len(test)} test sentences; {tokens} tokens an epoch"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, help="folder with train.tsv and test.tsv, rows of label<TAB>sentence"
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab-size", type=int, default=1000, help="sentencepiece pieces")
    parser.add_argument(
        "--max-pieces", type=int, default=62, help="cut longer sentences: max_positions less <s>, </s>"
    )
    parser.add_argument(
        "--n-valid", type=int, default=500, help="training sentences held back for validation"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    shutil.rmtree(args.out, ignore_errors=True)  # fairseq-preprocess refuses to overwrite a dictionary
    print(prepare(**vars(args)))


if __name__ == "__main__":
    sys.exit(main())
