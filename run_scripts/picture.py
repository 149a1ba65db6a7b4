"""Accuracy against bytes on the disk: picture.py RESULT.json ... -o PICTURE.png

A result is what `fairseq-qn train` leaves in its folder of work, or accuracy/seeds.py in its own: a row each
for the dense model, for it frozen at once, and for the small file. Where there are several seeds, bars show
one standard deviation.
"""

import argparse
import json
from pathlib import Path
from typing import Any

MARKS = {"dense": "s", "at_once": "X", "small": "o"}
NAMES = {"dense": "dense, fp32", "at_once": "frozen at once", "small": "noise, then stages"}


def draw(results: list[tuple[str, dict[str, Any]]], path: Path) -> None:
    """One line for each result, from its dense model to its small file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    for i, (name, rows) in enumerate(results):
        colour = f"C{i}"
        ends = [rows["small"], rows["dense"]]
        axes.plot([megabytes(row) for row in ends], [score(row) for row in ends], color=colour, label=name)
        for kind, row in rows.items():
            at = (megabytes(row), score(row))
            axes.errorbar(
                *at, yerr=row.get("sd", 0), marker=MARKS[kind], color=colour, markersize=8, capsize=3
            )
            label = f"{at[1]:.1f}, {at[0]:.2f} MB"
            axes.annotate(label, at, xytext=(9, 5), textcoords="offset points", fontsize=9)
    for kind, mark in MARKS.items():
        axes.plot([], [], mark, color="grey", label=NAMES[kind])
    measure = "accuracy, %" if "accuracy" in results[0][1]["dense"] else "Spearman x 100"
    axes.set(xscale="log", xlabel="MB on the disk (10$^6$ bytes)", ylabel=f"{measure}, test set")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.margins(x=0.25, y=0.1)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)


def megabytes(row: dict[str, Any]) -> float:
    return row["bytes"] / 1e6


def score(row: dict[str, Any]) -> float:
    return row.get("accuracy", row.get("spearman"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    read = [json.loads(path.read_text()) for path in args.results]
    draw([(data.get("name", ""), data.get("rows", data)) for data in read], args.output)


if __name__ == "__main__":
    main()
