"""A fairseq-train run beside this process: its log in a file, how far it is, and an end with ours."""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from fairseq_qn.errors import TrainingError

SLOWER = 1.5  # a step with a teacher and noise, against a dense one: for the time left
MINUTES = 5  # between lines, where a tenth takes longer


class Progress:
    """Prints how far a run is and how long it lasts: over itself on a terminal, else a line for each tenth,
    once the time can be told, and every MINUTES.
    """

    def __init__(self, name: str, updates: int, after: float, out: TextIO | None = None) -> None:
        """after: the work of the runs that follow, in updates of this one."""
        self.name, self.updates, self.after = name, updates, after
        self.out = out or sys.stderr
        self.first: tuple[float, int] | None = None  # (seconds, updates) of the first line of the log
        self.said, self.when, self.valid = -1, -math.inf, ""

    def line(self, text: str, now: float) -> None:
        """A line that fairseq printed: JSON of `train_inner` or `valid`, or anything else."""
        start = text.find("{")
        try:
            figures = json.loads(text[start:]) if start >= 0 else {}
        except ValueError:
            return
        if not isinstance(figures, dict):
            return
        if score := figures.get("valid_accuracy"):
            self.valid = f", valid accuracy {score}"
        elif score := figures.get("valid_loss"):
            self.valid = f", valid loss {score}"
        elif "num_updates" in figures and "loss" in figures:
            self._update(int(float(figures["num_updates"])), str(figures["loss"]), now)

    def _update(self, done: int, loss: str, now: float) -> None:
        self.first = self.first or (now, done)
        begun, before = self.first
        left = ""
        if done > before:
            pace = (now - begun) / (done - before)
            left = f", {duration(pace * (self.updates - done))} left"
            left += f" ({duration(pace * (self.updates - done + self.after))} in all)" if self.after else ""
        share = 10 * done // max(1, self.updates)
        terminal = self.out.isatty()
        if terminal or share > self.said or (left and now > self.when + 60 * MINUTES):
            self.said, self.when = share, now if left else -math.inf
            text = f"{self.name}: {done:,} of {self.updates:,} updates, loss {loss}{self.valid}{left}"
            print(f"\r{text:<100}"[:120] if terminal else text, end="" if terminal else "\n", file=self.out)
            self.out.flush()


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    >>> duration(42), duration(400), duration(9000)
    ('42 s', '7 min', '2 h 30 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def watch(
    words: Sequence[str], folder: Path, log: Path, env: dict[str, str], keep: int, progress: Progress | None
) -> None:
    """Run a command in `folder` to its end. Raises TrainingError that names the last line of its log.

    keep: a descriptor that the command inherits; a lock on it lasts as long as the command. The command ends
    when this process ends, however that ends.
    """
    with log.open("ab") as file:
        process = subprocess.Popen(
            words, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, pass_fds=(keep,), preexec_fn=_end_with_parent,
        )  # fmt: skip
        last = ""
        with _ending(process):
            assert process.stdout is not None
            for raw in process.stdout:
                file.write(raw)
                file.flush()
                text = raw.decode(errors="replace").rstrip()
                last = text or last
                if progress is not None:
                    progress.line(text, time.monotonic())
            status = process.wait()
    if progress is not None and progress.out.isatty():
        print(file=progress.out)
    if status:
        raise TrainingError(f"{words[0]} ended with status {status}; see {log}; its last line: {last}")


@contextlib.contextmanager
def _ending(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ends the process when the block is left before it has ended, by SIGTERM too."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        before = None
    try:
        yield
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _end_with_parent() -> None:
    """SIGTERM when the parent is gone, by SIGKILL too, where the system is Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def environment() -> dict[str, str]:
    """Ours, with the programs that lie beside this Python found first."""
    programs = os.path.dirname(sys.executable)
    # with other work on the machine, threads that wait by spinning were four times slower
    return {
        "OMP_WAIT_POLICY": "passive",
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}",
    }
