"""Labelled sentences from a tab-separated file, and the lines that are bad."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairseq_qn.errors import DataError
from fairseq_qn.interop.tsv import Row, read_tsv, values


def write(folder: Path, data: bytes) -> Path:
    path = folder / "rows.tsv"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "rows"),
    [
        (b"a\tx  y\nb\tz", [Row(1, "a", ("x y",)), Row(2, "b", ("z",))]),
        (b"a\tx\ty\r\n\r\nb\tz\tw\r\n", [Row(1, "a", ("x", "y")), Row(3, "b", ("z", "w"))]),
        (b"\xef\xbb\xbflabel\tsentence\na\tx\n", [Row(2, "a", ("x",))]),
        (b"Sentence1\tSentence2\tScore\nx\ty\t0.5\n", [Row(2, "0.5", ("x", "y"))]),
        (b'a\t"x, y\na\tz "w"\n', [Row(1, "a", ('"x, y',)), Row(2, "a", ('z "w"',))]),
        ("a\té\u2028x\x85y\n".encode(), [Row(1, "a", ("é x y",))]),  # lines end with \n alone
        (b"label\tlabel me\n", [Row(1, "label", ("label me",))]),
    ],
)
def test_rows(data: bytes, rows: list[Row], tmp_path: Path) -> None:
    assert read_tsv(write(tmp_path, data)) == rows


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "expected lines of label<TAB>sentence"),
        (b"label\tsentence\n\n", "expected lines of label<TAB>sentence"),
        (b"only words\n", "line 1: expected 2 columns, label<TAB>sentence, found 1"),
        (b"a\tb\tc\td\n", "line 1: expected 3 columns, label<TAB>sentence<TAB>second sentence, found 4"),
        (b"a\tx\n\nb\ty\tz\nb\n", "lines 3 and 4: expected 2 columns, label<TAB>sentence, found 3"),
        (b"a\tx\n" + b"b\n" * 9, "lines 2, 3, 4, 5, 6 and 4 more: expected 2 columns"),
        (b"a\tx\nb\t\xff\n", "line 2: expected UTF-8"),
        (b"a\tx\n\ty\n", "line 2: expected a label and a sentence, found an empty column"),
        (b"a\tx\t\n", "line 1: expected a label and a sentence, found an empty column"),
        (b"sentence\ttext\n", "line 1: expected a header of label, sentence"),
    ],
)
def test_bad_rows_are_named_by_line(data: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_tsv(write(tmp_path, data))
    assert f"rows.tsv: {said}" in str(error.value)


def test_values() -> None:
    rows = [Row(i, label, ("x",)) for i, label in enumerate(["1", "-2.5e1", "nan", "x", "inf"], 1)]
    assert values(rows[:2], "f") == [1, -25]
    with pytest.raises(DataError, match="f: lines 3, 4 and 5: expected a number as label, found 'nan'"):
        values(rows, "f")


@given(data=st.binary(max_size=40) | st.text("ab\t\n\r é", max_size=40).map(str.encode))
def test_any_bytes_are_rows_or_a_named_error(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.getbasetemp(), data)
    try:
        rows = read_tsv(path)
    except DataError:
        return
    assert rows and len({len(row.sentences) for row in rows}) == 1
    assert all(row.label and all(row.sentences) for row in rows)
