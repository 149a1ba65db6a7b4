"""The parts of one or more runs of benchmark.sh as one page: collect.py OUT [--page README.md]

Writes every table found in OUT to the page, by default run_scripts/benchmark/README.md, and prints the few
rows that the project's README shows: what, ours, the best peer, ours as a multiple of it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness import OURS, show

PARTS = ("kmeans", "compress", "train", "infer", "predict", "file", "file_features", "file_logits")
INTRODUCTION = """# Benchmarks

Written by `collect.py` from what `bash run_scripts/benchmark.sh` measured. A cell holds the median over the
turns and, in brackets, ours as a multiple of it: the median of the ratios within a turn. Contenders run in
turn, in both orders. Compare ratios, not seconds: machines are noisy, and a training step's ratios differ by
some 5% from run to run.
"""
# part, how a case begins, what it is
ROWS = (
    ("kmeans", "3,072 x 768, d = 8", "k-means of a 3,072 x 768 layer, K 256"),
    ("compress", "roberta_base, 125 M, time", "checkpoint to file, the whole command"),
    ("train", "proxy noise, p = 0.1", "a training step with noise (6 layers x 384)"),
    ("infer", "all 8, features, 1x32", "features of 1 x 32 tokens"),
    ("infer", "all 8, features, 16x128", "features of 16 x 128 tokens"),
    ("file", "roberta_base", "bytes on the disk"),
    ("file_features", "packed: time", "from the file to the first features"),
)
OWN = ("ours", OURS)


def best_peer(case: dict) -> tuple[str, dict] | None:
    """The contender of others that did best."""
    peers = {name: data for name, data in case["contenders"].items() if not name.startswith(OWN)}
    return min(peers.items(), key=lambda peer: peer[1]["median"], default=None)


def rows(out: Path) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| | fairseq_qn | best peer | ours / peer |", "| --- | ---: | ---: | ---: |"]
    for part, begins, what in ROWS:
        path = out / f"{part}.json"
        cases = json.loads(path.read_text())["cases"] if path.is_file() else []
        case = next((case for case in cases if case["case"].startswith(begins)), None)
        peer = case and best_peer(case)
        if not peer:
            continue
        name, data = peer
        mine = show(case["contenders"][OURS]["median"], case["unit"])
        theirs = show(data["median"], case["unit"])
        lines.append(f"| {what} | {mine} | {theirs}, {name} | {data['ratio_of_ours']:.2f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--page", type=Path, default=Path(__file__).with_name("README.md"))
    args = parser.parse_args()
    tables = [(args.out / f"{part}.md").read_text() for part in PARTS if (args.out / f"{part}.md").is_file()]
    args.page.write_text("\n".join([INTRODUCTION, *tables]), encoding="utf-8")
    print("\n".join(rows(args.out)))


if __name__ == "__main__":
    main()
