"""Labelled sentences -> the binary sets that fairseq's sentence_prediction reads."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import make_builder
from torch import Tensor

from fairseq_qn.errors import DataError
from fairseq_qn.interop.tsv import Row, values
from fairseq_qn.models.batches import token_ids
from fairseq_qn.models.starting import write_dictionary

_RESERVED = re.compile(r"<(s|pad|/s|unk|mask)>|madeupword\d{4,}")  # names that fairseq's dictionaries use
_SPECIALS = {1: 2, 2: 4}  # <s> a </s>, or <s> a </s> </s> b </s>


@dataclass(frozen=True)
class SetSize:
    """One set. tokens: all; cut: sentences cut to fit; unknown: pieces that the dictionary lacks."""

    rows: int
    tokens: int
    longest: int
    cut: int
    unknown: int


def are_numbers(rows: Sequence[Row], path: str | Path) -> bool:
    """Whether labels are to be regressed: all are numbers, and one at least is not written as a whole one.

    >>> are_numbers([Row(1, "0.5", ("a",)), Row(2, "3", ("b",))], "x.tsv")
    True
    >>> are_numbers([Row(1, "0", ("a",)), Row(2, "1", ("b",))], "x.tsv")
    False
    """
    try:
        return any(not row.label.lstrip("+-").isdecimal() for row in rows) and bool(values(rows, path))
    except DataError:
        return False


def label_names(rows: Sequence[Row], path: str | Path) -> list[str]:
    """The classes of the training rows, sorted. Raises DataError for fewer than two, or reserved names."""
    for row in rows:
        if _RESERVED.fullmatch(row.label):
            raise DataError(
                f"{path}: line {row.line}: fairseq uses the name {row.label!r}; rename the label"
            )
    names = sorted({row.label for row in rows})
    if len(names) < 2:
        raise DataError(f"{path}: expected at least two labels, found only {names[0]!r}")
    return names


def check_known(rows: Sequence[Row], names: Sequence[str], path: str | Path, train: str | Path) -> None:
    """Raise DataError for a label that training has not seen."""
    known = set(names)
    bad = [row for row in rows if row.label not in known]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise DataError(
            f"{path}: line {bad[0].line}{more}: expected a label of {train}, found {bad[0].label!r}"
        )


def check_columns(sets: Mapping[str, Sequence[Row]], paths: Mapping[str, Any]) -> int:
    """How many sentences a row has. Raises DataError where one set has pairs and another none."""
    counts = {name: len(rows[0].sentences) for name, rows in sets.items()}
    for name, count in counts.items():
        if count != counts["train"]:
            raise DataError(
                f"{paths[name]}: expected {counts['train']} sentences a row as in {paths['train']}, found "
                f"{count}"
            )
    return counts["train"]


def write_sets(
    folder: Path,
    sets: Mapping[str, Sequence[Row]],
    names: Sequence[str] | None,
    dictionary: Dictionary,
    encode: Any,
    max_positions: int,
    seed: int,
) -> dict[str, SetSize]:
    """Write input0, input1 (of pairs) and label below `folder`, each with its dictionary; sizes by set.

    names: the classes in the order of the head's outputs; None: labels are numbers. The training set is
    sorted by length, in random order among equals: fairseq makes batches of neighbours, and shuffles the
    batches.
    """
    pair = len(next(iter(sets.values()))[0].sentences)
    sizes = {}
    for name, rows in sets.items():
        encoded = [[_ids(dictionary, encode, text) for text in row.sentences] for row in rows]
        room = max_positions - _SPECIALS[pair]
        fitting = [_cut(ids, room) for ids in encoded]
        unknown = sum(int((ids == dictionary.unk()).sum()) for row in encoded for ids in row)
        order = list(range(len(rows)))
        if name == "train":
            random.Random(seed).shuffle(order)
            order.sort(key=lambda i: sum(map(len, fitting[i])))
        lengths = [sum(map(len, ids)) + _SPECIALS[pair] for ids in fitting]
        cut = sum(sum(map(len, a)) < sum(map(len, b)) for a, b in zip(fitting, encoded, strict=True))
        for column in range(pair):
            _write(folder / f"input{column}", name, [fitting[i][column] for i in order], dictionary)
        _write_labels(folder / "label", name, [rows[i] for i in order], names)
        sizes[name] = SetSize(len(rows), sum(lengths), max(lengths), cut, unknown)
    if names is not None:  # after the sets: with it the folder is complete
        counts = Counter(row.label for row in sets["train"])
        text = "".join(f"{label} {counts[label] or 1}\n" for label in names)
        (folder / "label" / "dict.txt").write_text(text, encoding="utf-8")
    return sizes


def _ids(dictionary: Dictionary, encode: Any, text: str) -> Tensor:
    return token_ids(dictionary, encode(text))[: 1 << 16].int()  # of a line of megabytes


def _cut(ids: list[Tensor], room: int) -> list[Tensor]:
    """As many pieces as there is room for: off the end, of a pair's longer sentence first."""
    if len(ids) == 1:
        return [ids[0][:room]]
    first = max(room - room // 2, room - len(ids[1]))
    return [ids[0][:first], ids[1][: room - min(first, len(ids[0]))]]


def _write(folder: Path, name: str, rows: Sequence[Tensor], dictionary: Dictionary) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    builder = make_builder(str(folder / f"{name}.bin"), "mmap", vocab_size=len(dictionary))
    end = torch.tensor([dictionary.eos()], dtype=torch.int32)
    for ids in rows:
        builder.add_item(torch.cat([ids, end]))
    builder.finalize(str(folder / f"{name}.idx"))
    if not (folder / "dict.txt").exists():
        write_dictionary(folder / "dict.txt", dictionary)


def _write_labels(folder: Path, name: str, rows: Sequence[Row], names: Sequence[str] | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if names is None:
        numbers = values(rows, folder)
        (folder / f"{name}.label").write_text("".join(f"{number!r}\n" for number in numbers))
        return
    labels = Dictionary()
    for label in names:
        labels.add_symbol(label)
    builder = make_builder(str(folder / f"{name}.bin"), "mmap", vocab_size=len(labels))
    for row in rows:
        builder.add_item(torch.tensor([labels.index(row.label), labels.eos()], dtype=torch.int32))
    builder.finalize(str(folder / f"{name}.idx"))
