"""What the parts share: contenders run in turn, the limits of this machine, one table and one JSON file for
each part.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

OURS = "fairseq_qn"


@dataclass
class Case:
    """One line of a table: values of ours and of each peer, repeat by repeat, lower being better.

    unit: of the values, s or B. limit: what this machine's arithmetic or memory allows, in the same unit,
    and `limited_by` what it is. ratio of ours to a peer: the median over the repeats of the quotients within
    a repeat.
    """

    name: str
    values: Mapping[str, list[float]]
    limit: float | None = None
    limited_by: str = ""
    unit: str = "s"
    extra: dict[str, Any] = field(default_factory=dict)

    def ratio(self, peer: str, ours: str = OURS) -> float:
        pairs = zip(self.values[ours], self.values[peer], strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)

    def median(self, name: str = OURS) -> float:
        return statistics.median(self.values[name])

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"case": self.name, "unit": self.unit, "contenders": {}}
        for name, values in self.values.items():
            data["contenders"][name] = {"median": statistics.median(values), "all": values}
            if name != OURS and OURS in self.values:
                data["contenders"][name]["ratio_of_ours"] = self.ratio(name)
        if self.limit is not None:
            data["limit"] = {
                "value": self.limit,
                "by": self.limited_by,
                "share_reached": self.limit / self.median(),
            }
        return data | self.extra


def race(
    contenders: Mapping[str, Callable[[], Any]], repeats: int = 5, inner: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call: one uncounted round, then `repeats` rounds, every second one in reverse order.

    inner: calls within one measurement, for calls that take less than some milliseconds.
    """
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, repeats):
        for name in names if turn % 2 else reversed(names):
            began = time.perf_counter()
            for _ in range(inner):
                contenders[name]()
            if turn >= 0:
                seconds[name].append((time.perf_counter() - began) / inner)
    return seconds


def run_fresh(script: str | Path, *args: object) -> dict[str, Any]:
    """Run a script in a process of its own; its last line of stdout is JSON."""
    command = [sys.executable, str(script), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_memory() -> int:
    """Bytes of memory that this process held at most so far.

    Of Linux' own high-water mark: what getrusage says of a child begins at what its parent held when it was
    started.
    """
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


@cache
def flops_per_second() -> float:
    """What the best of several fp32 matrix products reaches, with the threads that torch uses."""
    import torch

    a, b = torch.randn(2048, 1024), torch.randn(1024, 2048)
    return 2 * 2048 * 1024 * 2048 / min(race({"mm": lambda: torch.mm(a, b)}, 12)["mm"])


@cache
def bytes_per_second() -> float:
    """What the best of several reads of 512 MB reaches."""
    import torch

    x = torch.ones(128 << 20)
    return 4 * x.numel() / min(race({"sum": lambda: x.sum()}, 7)["sum"])


def roofline(flops: float, memory: float) -> tuple[float, str]:
    """Seconds that so many operations and bytes take at least, and which of the two it is."""
    arithmetic, traffic = flops / flops_per_second(), memory / bytes_per_second()
    return max(arithmetic, traffic), "arithmetic" if arithmetic >= traffic else "memory"


@cache
def machine() -> dict[str, Any]:
    """The processor and what runs on it."""
    import torch

    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        features = re.search(r"flags\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        known = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
        units = [unit for unit in known if features and unit in features[1].split()]
    except OSError:
        found, units = None, []
    return {
        "processor": found[1] if found else platform.processor() or platform.machine(), "units": units,
        "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def show(value: float, unit: str) -> str:
    """A value as a person reads it."""
    if unit == "s":
        return (
            f"{value:.2f} s"
            if value >= 1
            else f"{value * 1e3:.1f} ms"
            if value >= 1e-3
            else f"{value * 1e6:.0f} us"
        )
    return f"{value / 1e6:.1f} MB" if unit == "B" else f"{value:.4g} {unit}"


def render(cases: list[Case], title: str, notes: list[str]) -> str:
    """A Markdown table: a line per case, a column per contender with ours as a multiple of it, the limit,
    the share.
    """
    peers = list(dict.fromkeys(name for case in cases for name in case.values if name != OURS))
    limited = any(case.limit is not None for case in cases)
    heads = [
        "",
        OURS,
        *(f"{peer} (ours / it)" for peer in peers),
        *(["limit", "share reached"] if limited else []),
    ]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for case in cases:
        row = [case.name, show(case.median(), case.unit) if OURS in case.values else "-"]
        for peer in peers:
            there = peer in case.values
            row.append(f"{show(case.median(peer), case.unit)} ({case.ratio(peer):.3g})" if there else "-")
        if limited and case.limit is not None:
            row += [f"{show(case.limit, case.unit)}, {case.limited_by}", f"{case.limit / case.median():.0%}"]
        elif limited:
            row += ["-", "-"]
        lines.append(row)
    info = machine()
    where = (
        f"{info['processor']} ({', '.join(info['units'])}), {info['threads']} threads, torch "
        f"{info['torch']}, "
        f"Python {info['python']}, {info['date']}"
    )
    body = "\n".join("| " + " | ".join(row) + " |" for row in lines)
    # two blanks break a line
    said = [note if note.startswith("|") or not note else f"{note}  " for note in notes]
    return "\n".join([f"### {title}", "", body, "", *said, where, ""])


def report(part: str, title: str, cases: list[Case], notes: list[str], args: argparse.Namespace,
           extra: Mapping[str, Any] | None = None) -> None:  # fmt: skip
    """Print the table; write it, and everything measured, to OUT/PART.md and OUT/PART.json."""
    text = render(cases, title, notes)
    data = {
        "part": part,
        "machine": machine(),
        "repeats": args.repeats,
        "cases": [c.to_dict() for c in cases],
        "notes": notes,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{part}.md").write_text(text, encoding="utf-8")
    (args.out / f"{part}.json").write_text(
        json.dumps(data | dict(extra or {}), indent=1) + "\n", encoding="utf-8"
    )
    print(f"\n{text}", flush=True)


def arguments(part: str) -> argparse.ArgumentParser:
    """Options of every part."""
    parser = argparse.ArgumentParser(description=f"Benchmark: {part}")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"))
    parser.add_argument("--repeats", type=int, default=5)
    return parser


def progress(what: str) -> None:
    """One line on stderr."""
    print(f"  {what}", file=sys.stderr, flush=True)
