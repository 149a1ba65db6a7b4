"""Lines of a recipe: what each may be. A wrong one is a RecipeError that says where, expected and found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from fairseq_qn.errors import RecipeError


def pattern(value: Any, where: str) -> str:
    """A regular expression.

    >>> pattern("fc[12", "rules[0].layers")
    Traceback (most recent call last):
    fairseq_qn.errors.RecipeError: rules[0].layers: not a regular expression: 'fc[12': ...
    """
    if not isinstance(value, str):
        raise RecipeError(f"{where}: not a regular expression: {value!r}")
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise RecipeError(f"{where}: not a regular expression: {value!r}: {error}") from None
    return value


def sequence(value: Any, where: str) -> list[Any] | tuple[Any, ...]:
    """A list."""
    if not isinstance(value, (list, tuple)):
        raise RecipeError(f"{where}: expected a list, found {value!r}")
    return value


def mapping(value: Any, where: str) -> Mapping[str, Any]:
    """A mapping."""
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: expected a mapping, found {value!r}")
    return value


def only(data: Any, known: Iterable[str], where: str) -> None:
    """A mapping without lines that are not known.

    >>> only({"p": 0.1, "q": 1}, ("kind", "p"), "noise")
    Traceback (most recent call last):
    fairseq_qn.errors.RecipeError: noise: unknown q; known: kind, p
    """
    known = list(known)
    unknown = sorted(map(str, set(mapping(data, where)) - set(known)))
    if unknown:
        raise RecipeError(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(known)}")


def one_of(value: Any, known: Iterable[Any], where: str) -> Any:
    """One of a few values."""
    known = list(known)
    if value not in known:
        raise RecipeError(f"{where}: expected one of {known}, found {value!r}")
    return value


def flag(value: Any, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise RecipeError(f"{where}: expected true or false, found {value!r}")
    return value


def whole(value: Any, bounds: tuple[int, int], where: str, other: str = "") -> int:
    """A whole number within bounds; `other`: what else it may be, for the error.

    >>> whole(4, (2, 8), "bits"), whole(True, (0, 1), "bits")
    Traceback (most recent call last):
    fairseq_qn.errors.RecipeError: bits: expected a whole number from 0 to 1, found True
    """
    if type(value) is not int or not bounds[0] <= value <= bounds[1]:
        expected = f"a whole number from {bounds[0]} to {bounds[1]}{other}"
        raise RecipeError(f"{where}: expected {expected}, found {value!r}")
    return value
