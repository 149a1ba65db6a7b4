"""The last steps of quickstart.sh: accuracies of what was written, a table, a plot.

quickstart_report.py score FILE --rows TSV --data DATA -o JSON    a small file, or the dense checkpoint (.pt)
quickstart_report.py table JSON ... -o OUT                         prints, and writes OUT.json and OUT.png
"""

import argparse
import json
import os
import re
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
STYLES = {"dense": ("s", "tab:blue"), "at_once": ("X", "tab:orange"), "staged": ("o", "tab:green")}


def open_model(path: Path, data: Path) -> Any:
    """fairseq's hub interface over a checkpoint or a small file. Only the checkpoint needs the data
    folder.
    """
    from fairseq_qn.hub import QNRobertaModel

    if path.suffix != ".pt":
        return QNRobertaModel.from_pretrained(str(path))
    pieces = {
        "bpe": "sentencepiece",
        "sentencepiece_model": str((data / "sentencepiece.bpe.model").resolve()),
    }
    folder = str((data / "classify").resolve())
    return QNRobertaModel.from_pretrained(str(path.parent), path.name, data_name_or_path=folder, **pieces)


def weights_only(model: Any, path: Path) -> Path:
    """Write the fp32 weights and nothing else, as a classifier is shipped: without the LM head, tied tables
    once.
    """
    from safetensors.torch import save_file

    save_file({name: p.detach() for name, p in model.named_parameters() if ".lm_head." not in name}, path)
    return path


def score(args: argparse.Namespace) -> None:
    """Size on disk and accuracy on rows of label<TAB>sentence, through encode and predict of the hub
    interface.
    """
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
        tokens = (
            torch.cat([tokens[: limit - 1], tokens.new_tensor([end])]) if len(tokens) > limit else tokens
        )
        examples.append((tokens, labels.index(label)))
    examples.sort(key=lambda example: len(example[0]))
    correct = 0
    with torch.inference_mode():
        for i in range(0, len(examples), 64):
            tokens, wanted = zip(*examples[i : i + 64], strict=True)
            logits = hub.predict(
                HEAD, collate_tokens(list(tokens), pad_idx=hub.task.source_dictionary.pad())
            )
            correct += int((logits.argmax(1) == torch.tensor(wanted)).sum())
    seconds = time.time() - started
    path = args.file
    if path.suffix == ".pt":
        path = weights_only(hub.model, args.output.with_suffix(".safetensors"))
    result = {
        "file": str(path),
        "bytes": os.path.getsize(path),
        "sentences": len(examples),
        "correct": correct,
        "accuracy": 100 * correct / len(examples),
        "seconds": round(seconds, 1),
    }
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
    print(
        f"accuracy on {dense['sentences']:,} test sentences; the small files hold everything that answers: "
        "dictionary,\npieces and names of the labels too; the dense one its weights alone\n"
    )
    args.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, args.logs, args.output.with_suffix(".png"))


def plot(rows: dict[str, dict[str, Any]], logs: list[Path], path: Path) -> None:
    """Left: accuracy against bytes on disk. Right: accuracy while training, a dotted line where a stage was
    frozen.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, row), (marker, colour) in zip(rows.items(), STYLES.values(), strict=True):
        at = (row["bytes"] / 1e6, row["accuracy"])
        left.scatter(*at, marker=marker, color=colour, s=70, zorder=3, label=NAMES.get(name, name))
        left.annotate(
            f"{at[1]:.1f}%, {at[0]:.2f} MB", at, xytext=(0, 9), textcoords="offset points", ha="center"
        )
    left.set(xscale="log", xlabel="MB on disk (10$^6$ bytes)", ylabel="accuracy on the test sentences, %")
    left.set_xticks([0.2, 0.5, 1, 2, 5, 10, 20], labels=["0.2", "0.5", "1", "2", "5", "10", "20"])
    left.minorticks_off()
    left.margins(0.25)
    left.legend(loc="lower right")
    for log in logs:
        marker, colour = STYLES[log.stem]
        points, stages = training(log)
        right.plot(*zip(*points, strict=True), marker=marker, color=colour, label=log.stem)
        for update, stage in stages:
            right.axvline(update, color=colour, linestyle=":")
            right.text(update, 0.02, f" {stage}", color=colour, transform=right.get_xaxis_transform())
    right.set(xlabel="updates of fine-tuning", ylabel="accuracy on the validation sentences, %")
    right.legend(loc="center right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def training(log: Path) -> tuple[list[tuple[int, float]], list[tuple[int, str]]]:
    """([(update, validation accuracy)], [(update, stage frozen then)]) from what fairseq-train printed."""
    text = log.read_text(encoding="utf-8", errors="replace")
    points = re.findall(r"\| valid \|.*? accuracy ([\d.]+).*? num_updates (\d+)", text)
    stages = re.findall(r"update (\d+): stage (\w+) frozen", text)
    return [(int(update), float(accuracy)) for accuracy, update in points], [
        (int(u), name) for u, name in stages
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    sub = commands.add_parser("score", help=score.__doc__)
    sub.add_argument("file", type=Path)
    sub.add_argument("--rows", type=Path, required=True, help="label<TAB>sentence")
    sub.add_argument("--data", type=Path, required=True, help="what quickstart_data.py made")
    sub.add_argument("-o", "--output", type=Path, required=True)
    sub.set_defaults(function=score)
    sub = commands.add_parser("table", help=table.__doc__)
    sub.add_argument("scores", nargs="+", type=Path)
    sub.add_argument(
        "--logs", nargs="*", type=Path, default=[], help="of the training runs of the same names"
    )
    sub.add_argument("-o", "--output", type=Path, required=True, help="without suffix")
    sub.set_defaults(function=table)
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    sys.exit(main())
