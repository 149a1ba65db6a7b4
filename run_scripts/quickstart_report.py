"""The last steps of quickstart.sh: accuracies of what was written, a table, a plot.

quickstart_report.py score FILE --rows TSV --data DATA -o JSON     a small file, or a checkpoint (.pt) of the dense model
quickstart_report.py table JSON ... -o OUT                         prints, and writes OUT.json and OUT.png
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

HEAD = "sentence_classification_head"  # fairseq's default name
NAMES = {
    "dense": "dense, fp32 weights",
    "at_once": "frozen at once, no fine-tuning",
    "staged": "noise, three stages",
}


def open_model(path: Path, data: Path) -> Any:
    """fairseq's hub interface over a checkpoint or a small file. Only the checkpoint needs the data folder."""
    from fairseq_qn.hub import QNRobertaModel

    if path.suffix != ".pt":
        return QNRobertaModel.from_pretrained(str(path))
    pieces = {"bpe": "sentencepiece", "sentencepiece_model": str((data / "sentencepiece.bpe.model").resolve())}
    folder = str((data / "classify").resolve())
    return QNRobertaModel.from_pretrained(str(path.parent), path.name, data_name_or_path=folder, **pieces)


def weights_only(model: Any, path: Path) -> Path:
    """Write the fp32 weights and nothing else, as a classifier is shipped: without the LM head, tied tables once."""
    from safetensors.torch import save_file

    save_file({name: p.detach() for name, p in model.named_parameters() if ".lm_head." not in name}, path)
    return path


def score(args: argparse.Namespace) -> None:
    """Size on disk and accuracy on rows of label<TAB>sentence, through encode and predict of the hub interface."""
    import torch
    from fairseq.data.data_utils import collate_tokens
    from quickstart_data import read_rows

    hub = open_model(args.file, args.data).eval()
    dictionary = hub.task.label_dictionary
    labels = dictionary.symbols[dictionary.nspecial :]
    started = time.time()
    limit = hub.model.max_positions()
    end = hub.task.source_dictionary.eos()
    examples = []
    for label, sentence in read_rows(args.rows):
        tokens = hub.encode(sentence)
        tokens = torch.cat([tokens[: limit - 1], tokens.new_tensor([end])]) if len(tokens) > limit else tokens
        examples.append((tokens, labels.index(label)))
    examples.sort(key=lambda example: len(example[0]))
    correct = 0
    with torch.inference_mode():
        for i in range(0, len(examples), 64):
            tokens, wanted = zip(*examples[i : i + 64], strict=True)
            logits = hub.predict(HEAD, collate_tokens(list(tokens), pad_idx=hub.task.source_dictionary.pad()))
            correct += int((logits.argmax(1) == torch.tensor(wanted)).sum())
    seconds = time.time() - started
    path = args.file
    if path.suffix == ".pt":
        path = weights_only(hub.model, args.output.with_suffix(".safetensors"))
    result = {"file": str(path), "bytes": os.path.getsize(path), "sentences": len(examples), "correct": correct,
              "accuracy": 100 * correct / len(examples), "seconds": round(seconds, 1)}  # fmt: skip
    args.output.write_text(json.dumps(result, indent=1) + "\n")


def table(args: argparse.Namespace) -> None:
    """Print what `score` measured, the dense model first, and write it as JSON and as a plot."""
    rows = {path.stem: json.loads(path.read_text()) for path in args.scores}
    dense = next(iter(rows.values()))
    print(f"\n{'':32}{'bytes on disk':>14}{'smaller':>10}{'accuracy':>11}{'change':>9}")
    for name, row in rows.items():
        row["ratio"] = dense["bytes"] / row["bytes"]
        row["change"] = row["accuracy"] - dense["accuracy"]
        print(f"{NAMES.get(name, name):32}{row['bytes']:14,}{row['ratio']:9.1f}x{row['accuracy']:10.2f}%"
              f"{row['change']:+9.2f}")  # fmt: skip
    print(f"accuracy on {dense['sentences']:,} test sentences; the small files hold everything that answers: "
          "dictionary,\npieces and names of the labels too; the dense one its weights alone\n")  # fmt: skip
    args.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, args.output.with_suffix(".png"))


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy against bytes on disk."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    for (name, row), marker in zip(rows.items(), "sXo", strict=False):
        axes.scatter(row["bytes"] / 1e6, row["accuracy"], marker=marker, s=70, zorder=3, label=NAMES.get(name, name))
        axes.annotate(f"{row['accuracy']:.1f}%, {row['bytes'] / 1e6:.2f} MB", (row["bytes"] / 1e6, row["accuracy"]),
                      xytext=(0, 9), textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
    axes.set(xscale="log", xlabel="MB on disk (10$^6$ bytes)", ylabel="accuracy on the test sentences, %")
    axes.set_xticks([0.2, 0.5, 1, 2, 5, 10, 20], labels=["0.2", "0.5", "1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.margins(0.25)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=9)
    axes.set_title("banking77: 77 intents, one small RoBERTa", fontsize=11)
    figure.savefig(path, dpi=150)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("score", help=score.__doc__)
    sub.add_argument("file", type=Path)
    sub.add_argument("--rows", type=Path, required=True, help="label<TAB>sentence")
    sub.add_argument("--data", type=Path, required=True, help="what quickstart_data.py made")
    sub.add_argument("-o", "--output", type=Path, required=True)
    sub.set_defaults(function=score)
    sub = commands.add_parser("table", help=table.__doc__)
    sub.add_argument("scores", nargs="+", type=Path)
    sub.add_argument("-o", "--output", type=Path, required=True, help="without suffix")
    sub.set_defaults(function=table)
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    sys.exit(main())
