"""`fairseq-qn predict` on short sentences: 64 at a time beside one at a time.

    part_predict.py --file FILE.qn.safetensors [--sentences TSV]

Both run the command itself, in this process: lines are read, JSON is written. Loading the file is not
counted.

The quickstart's file on two idle threads of an AMD EPYC (AVX2): 1,000 sentences took 0.86 s in batches and
6.75 s one at a time (medians of 5 turns), 8.1 times as fast, with the same labels. In training the last
layer computes all tokens; here `<s>` alone, which both sides gain from.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

COUNT = 1000


def predict(file: Path, lines: Path, out: Path, batch: int) -> float:
    """Seconds of the answering alone, as the command itself says them; answers lie in `out`."""
    from fairseq_qn.cli import main
    from fairseq_qn.commands import predict as module

    seconds: list[float] = []
    say = module.Answering.say
    module.Answering.say = lambda self, spent: seconds.append(spent)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            words = ["--input", lines, "--output", out, "--batch", batch]
            if main(["predict", str(file), *map(str, words)]):
                raise RuntimeError(f"{file}: cannot answer {lines}")
    finally:
        module.Answering.say = say
    return seconds[0]


def answers(path: Path) -> list[tuple[str, float]]:
    rows = (json.loads(row)["answers"][0] for row in path.read_text(encoding="utf-8").splitlines())
    return [(row["text"], row["score"]) for row in rows]


def main() -> None:
    parser = harness.arguments("predict")
    root = Path(__file__).parents[2]
    parser.add_argument("--file", type=Path, default=root / "outputs/quickstart/quickstart.qn.safetensors")
    parser.add_argument("--sentences", type=Path, default=root / "run_scripts/data/banking77/test.tsv")
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args()
    from fairseq_qn.interop.tsv import read_tsv

    rows = read_tsv(args.sentences)
    sentences = [row.sentences[0] for row in random.Random(1).sample(rows, COUNT)]
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.txt"
        lines.write_text("".join(f"{line}\n" for line in sentences), encoding="utf-8")
        names = {harness.OURS: args.batch, "one at a time": 1}
        values: dict[str, list[float]] = {name: [] for name in names}
        found: dict[str, Any] = {}
        for turn in range(-1, args.repeats):
            for name in names if turn % 2 else reversed(names):
                harness.progress(f"{name}, repeat {turn}")
                spent = predict(args.file, lines, Path(folder) / "out.jsonl", names[name])
                found[name] = answers(Path(folder) / "out.jsonl")
                if turn >= 0:
                    values[name].append(spent)
                time.sleep(0.1)
    mine, theirs = found[harness.OURS], found["one at a time"]
    same = sum(a[0] == b[0] for a, b in zip(mine, theirs, strict=True))
    apart = max(abs(a[1] - b[1]) for a, b in zip(mine, theirs, strict=True))
    case = harness.Case(f"{COUNT:,} sentences, {args.batch} at a time", values, extra={"same": same})
    notes = [
        f"same label: {same:,} of {COUNT:,}; largest difference of a probability {apart:.1e}",
        f"times as fast as one at a time: {1 / case.ratio('one at a time'):.1f}",
    ]
    harness.report("predict", "Answering lines: fairseq-qn predict in batches", [case], notes, args)


if __name__ == "__main__":
    main()
