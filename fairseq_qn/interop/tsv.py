"""Labelled sentences in a tab-separated file: what `fairseq-qn data`, `train` and `evaluate` read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fairseq_qn.errors import DataError

COLUMNS = "label<TAB>sentence[<TAB>second sentence]"
NAMES = {
    "label": ("label", "score"),
    "sentence": ("sentence", "sentence1", "text", "text1", "premise"),
    "sentence2": ("sentence2", "text2", "hypothesis"),
}
_COLUMN_OF = {name: column for column, names in NAMES.items() for name in names}


class Row(NamedTuple):
    """One example. `line` counts from 1, a header and empty lines too; a pair has two sentences."""

    line: int
    label: str
    sentences: tuple[str, ...]


def read_tsv(path: str | Path) -> list[Row]:
    """The rows of a UTF-8 file of lines label<TAB>sentence or label<TAB>sentence<TAB>second sentence.

    All rows have as many columns as the first. A first line of nothing but names (NAMES, in any case) is a
    header, and then says the order of the columns. There is no quoting: quotation marks are text. Empty
    lines are left out; runs of blanks in a sentence become one. Raises DataError, which names the lines that
    are bad, and OSError.
    """
    order, rows = ["label", "sentence", "sentence2"], []
    wide, bad, why = 0, [], ""
    for number, raw in enumerate(Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        line = raw.removesuffix(b"\r")
        if not line.strip():
            continue
        cells = [" ".join(cell.split()) for cell in line.decode(errors="surrogateescape").split("\t")]
        if not wide and all(cell.lower() in _COLUMN_OF for cell in cells):
            order, wide = _header(cells, path), len(cells)
            continue
        wide = wide or min(max(len(cells), 2), 3)
        if wrong := _wrong(cells, wide):
            bad, why = [*bad, number], why or wrong
            continue
        row = dict(zip(order, cells))
        rows.append(Row(number, row["label"], tuple(row[c] for c in ("sentence", "sentence2")[: wide - 1])))
    if bad:
        raise DataError(f"{path}: {lines_of(bad)}: {why}")
    if not rows:
        raise DataError(f"{path}: expected lines of {COLUMNS}, found none")
    return rows


def values(rows: Sequence[Row], path: str | Path) -> list[float]:
    """The labels as numbers, for regression. Raises DataError, which names the lines that have none."""
    found = [_number(row.label) for row in rows]
    if bad := [i for i, value in enumerate(found) if not math.isfinite(value)]:
        lines = lines_of([rows[i].line for i in bad])
        raise DataError(f"{path}: {lines}: expected a number as label, found {rows[bad[0]].label!r}")
    return found


def _header(cells: list[str], path: str | Path) -> list[str]:
    order = [_COLUMN_OF[cell.lower()] for cell in cells]
    if sorted(order) not in (["label", "sentence"], ["label", "sentence", "sentence2"]):
        raise DataError(f"{path}: line 1: expected a header of label, sentence[, sentence2], found {cells}")
    return order


def _wrong(cells: list[str], wide: int) -> str:
    """Why a row cannot be used, or ""."""
    if len(cells) != wide:
        columns = "label<TAB>sentence" + "<TAB>second sentence" * (wide - 2)
        return f"expected {wide} columns, {columns}, found {len(cells)}"
    if any(not cell.isascii() and any("\udc80" <= c <= "\udcff" for c in cell) for cell in cells):
        return "expected UTF-8, found other bytes"
    return "" if all(cells) else "expected a label and a sentence, found an empty column"


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def lines_of(numbers: list[int]) -> str:
    """`line 3`, `lines 3, 7 and 9`, `lines 3, 7, 9 and 41 more`."""
    if len(numbers) == 1:
        return f"line {numbers[0]}"
    shown, more = numbers[:5], len(numbers) - 5
    last = f"{more:,} more" if more > 0 else str(shown.pop())
    return f"lines {', '.join(map(str, shown))} and {last}"
