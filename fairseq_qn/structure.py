"""Which stacks of layers share their weights, and which layers go: lines of a recipe, read and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fairseq_qn.errors import RecipeError
from fairseq_qn.lines import only, pattern, sequence, whole

EVERY_OTHER = "every_other"
MOST = 1 << 16  # layers


@dataclass(frozen=True)
class Share:
    """In the stacks whose whole name matches `layers`, each `chunk` adjacent layers share their weights.

    >>> Share.parse([{"layers": "encoder.layers", "chunk": 2}], "share")
    (Share(layers='encoder.layers', chunk=2),)
    """

    layers: str
    chunk: int

    @classmethod
    def parse(cls, data: Any, where: str) -> tuple[Share, ...]:
        """The `share` lines of a recipe. Raises RecipeError."""
        entries = [(entry, f"{where}[{i}]") for i, entry in enumerate(sequence(data or [], where))]
        for entry, at in entries:
            only(entry, ("layers", "chunk"), at)
            pattern(entry.get("layers"), f"{at}.layers")
            whole(entry.get("chunk"), (2, MOST), f"{at}.chunk")
        return tuple(cls(entry["layers"], entry["chunk"]) for entry, _ in entries)


@dataclass(frozen=True)
class Prune:
    """Of the stacks whose whole name matches `layers`, the layers that are kept on the way out: their
    numbers, or "every_other", beginning with the first.

    >>> Prune.parse([{"layers": ".*layers", "keep": [0, 2]}], "prune")
    (Prune(layers='.*layers', keep=(0, 2)),)
    """

    layers: str
    keep: str | tuple[int, ...]

    @classmethod
    def parse(cls, data: Any, where: str) -> tuple[Prune, ...]:
        """The `prune` lines of a recipe. Raises RecipeError."""
        entries = [(entry, f"{where}[{i}]") for i, entry in enumerate(sequence(data or [], where))]
        for entry, at in entries:
            only(entry, ("layers", "keep"), at)
            pattern(entry.get("layers"), f"{at}.layers")
        return tuple(cls(entry["layers"], kept(entry.get("keep"), f"{at}.keep")) for entry, at in entries)


def kept(keep: Any, where: str) -> str | tuple[int, ...]:
    """`every_other`, or the rising numbers of layers. Raises RecipeError.

    >>> kept([4, 2], "keep")
    Traceback (most recent call last):
    fairseq_qn.errors.RecipeError: keep: expected every_other or rising numbers of layers, found [4, 2]
    """
    if keep == EVERY_OTHER:
        return EVERY_OTHER
    numbers = list(keep) if isinstance(keep, (list, tuple)) else []
    whole_ones = all(type(n) is int and 0 <= n < MOST for n in numbers)
    if not numbers or not whole_ones or numbers != sorted({*numbers}):
        raise RecipeError(f"{where}: expected {EVERY_OTHER} or rising numbers of layers, found {keep!r}")
    return tuple(numbers)
