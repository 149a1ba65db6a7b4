"""Checkpoint to finished file: wall time, processor time and peak memory of the whole command, in a process
of its own.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness import OURS, Case, arguments, progress, report, roofline, run_fresh

HERE = Path(__file__).parent
ONCE = HERE / "compress_once.py"
RECIPE = HERE.parents[1] / "configs" / "recipes" / "roberta.yaml"
FAISS, SAVE = "the same with faiss-cpu's k-means", "torch.save of the fp32 model"
# layers, width, heads, millions of parameters
SIZES = {
    "1/4": (6, 384, 6, 30.3),
    "roberta_base": (12, 768, 12, 124.7),
    "roberta_large": (24, 1024, 16, 355.4),
}
ITERATIONS, K = 20, 256


def run(contender: str, checkpoint: Path, out: Path) -> tuple[float, float, float]:
    """(seconds, processor seconds, peak bytes) of one process, its start and imports included."""
    began = time.perf_counter()
    command = [sys.executable, str(ONCE), contender, str(checkpoint), str(RECIPE), str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise RuntimeError(f"{' '.join(command)}: {errors.decode()[-2000:]}")
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def written(folder: Path, layers: int, width: int, heads: int) -> Path:
    """A checkpoint, by a process of its own: what this one has held would count as the peak of those that it
    starts.
    """
    command = [sys.executable, HERE / "checkpoints.py", folder]
    for name, value in (("layers", layers), ("width", width), ("heads", heads)):
        command += [f"--{name}", value]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return folder / "model.pt"


def measure(size: str, folder: Path, repeats: int, peers: Sequence[str]) -> list[Case]:
    """Lines for time and memory of one size; contenders run in turn, every second round in reverse order."""
    layers, width, heads, millions = SIZES[size]
    checkpoint, out = written(folder / size.replace("/", "-"), layers, width, heads), folder / "out"
    contenders = {OURS: "command", **{FAISS: "faiss", SAVE: "torch.save"}}
    names = [name for name in contenders if name == OURS or name in peers]
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in names if turn % 2 else reversed(names):
            progress(f"compress: {size}, {name}")
            found[name].append(run(contenders[name], checkpoint, out))
    steps = run_fresh(ONCE, "steps", checkpoint, RECIPE, out)
    limit, by = roofline(2e6 * millions * K * ITERATIONS, 4e6 * millions * ITERATIONS)
    processor = {name: [v[1] for v in f] for name, f in found.items()}
    extra = {"parameters": millions * 1e6, "steps": steps, "cpu_seconds": processor}
    label = f"{size}, {millions:.0f} M"
    return [
        Case(
            f"{label}, time", {name: [v[0] for v in f] for name, f in found.items()}, limit, by, extra=extra
        ),
        Case(f"{label}, peak memory", {name: [v[2] for v in f] for name, f in found.items()}, unit="B"),
    ]


def growth(cases: Sequence[Case]) -> float | None:
    """The slope of log time over log parameters, by least squares."""
    points = [(math.log(c.extra["parameters"]), math.log(c.median())) for c in cases if c.unit == "s"]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points)).slope


def notes(cases: Sequence[Case], without_kernel: float | None = None) -> list[str]:
    """What the table says under it."""
    lines = [
        f"The whole command: start, imports, checkpoint to finished file; {ITERATIONS} iterations of "
        f"k-means, K = {K}."
    ]
    for case in cases:
        if case.unit == "s":
            steps = ", ".join(f"{name} {seconds:.1f}" for name, seconds in case.extra["steps"].items())
            lines.append(f"{case.name}, one run by steps, in seconds: {steps}.")
    slope = growth(cases)
    lines += [f"Time grows as parameters^{slope:.2f}."] if slope is not None else []
    lines += (
        [f"Without the compiled kernel (one run, roberta_base): {without_kernel:.0f} s."]
        if without_kernel
        else []
    )
    return [
        *lines,
        "limit: the operations of k-means at the rate of this machine's fp32 matrix product, and nothing "
        "else.",
    ]


def main() -> None:
    """Measure every size, or those asked for, and report."""
    parser = arguments("compress")
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES), help="some sizes")
    parser.add_argument("--peers", nargs="*", choices=[FAISS, SAVE], default=[FAISS, SAVE])
    parser.add_argument(
        "--checkpoints", type=Path, help="folder that keeps the checkpoints for the next time"
    )
    parser.add_argument(
        "--plain", action="store_true", help="roberta_base without the compiled kernel too, once"
    )
    args = parser.parse_args()
    extra: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.checkpoints or Path(temporary)
        peers = {"roberta_base": args.peers}
        cases = [
            case for size in args.only for case in measure(size, folder, args.repeats, peers.get(size, []))
        ]
        if args.plain:
            base = written(folder / "roberta_base", *SIZES["roberta_base"][:3])
            extra["without_kernel_seconds"] = run("plain", base, folder / "out")[0]
    extra["growth"] = growth(cases)
    report("compress", "fairseq-qn compress, from a checkpoint to the file", cases,
           notes(cases, extra.get("without_kernel_seconds")), args, extra)  # fmt: skip


if __name__ == "__main__":
    main()
