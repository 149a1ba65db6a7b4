"""How far fairseq-train is: what is printed of its log, and when."""

from __future__ import annotations

import io
import json

from fairseq_qn.commands.progress import Progress


def said(updates: int, seconds: float, every: int = 10, after: float = 0) -> list[str]:
    """What is printed of a run whose updates take so many seconds, where that is no terminal."""
    out = io.StringIO()
    progress = Progress("dense", updates, after, out)
    for done in range(every, updates + 1, every):
        figures = json.dumps({"num_updates": str(done), "loss": "0.5"})
        progress.line(f"2026-01-01 00:00:00 | INFO | train_inner | {figures}", seconds * done)
    return out.getvalue().splitlines()


def test_a_line_for_each_tenth() -> None:
    lines = said(1000, 0.1)
    assert [line.split(" of ")[0] for line in lines] == [
        f"dense: {n:,}" for n in (10, 20, *range(100, 1001, 100))
    ]
    assert "left" not in lines[0] and lines[1].endswith("loss 0.5, 2 min left")


def test_the_time_is_told_as_soon_as_it_is_known_and_every_five_minutes() -> None:
    """A long run: a tenth of it takes an hour."""
    lines = said(40_000, 1.0, after=20_000)
    assert lines[1].startswith("dense: 20 of") and lines[1].endswith("11 h 06 min left (16 h 40 min in all)")
    assert 130 < len(lines) < 150


def test_what_is_no_figure_is_passed_over() -> None:
    out = io.StringIO()
    progress = Progress("dense", 10, 0, out)
    for line in (
        "",
        "{",
        "[1]",
        '{"num_updates": "3"}',
        "{'loss': 1}",
        "Traceback (most recent call last):",
    ):
        progress.line(line, 1.0)
    assert out.getvalue() == ""
