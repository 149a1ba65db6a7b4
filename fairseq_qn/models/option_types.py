"""What an option may be: a flag, a number within bounds, ...; never code or an interpolation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

NAME = re.compile(r"[\w-]{1,64}")
_NUMERALS = re.compile(r"\[?\d{1,9}(, ?\d{1,9})*\]?", re.ASCII)


@dataclass(frozen=True)
class OptionType:
    """What an option may be: in words, for errors, and whether a value is that."""

    what: str
    allows: Callable[[Any], bool]

    def __str__(self) -> str:
        return self.what

    def read(self, value: Any) -> Any:
        """The value as fairseq is to get it. Raises ValueError."""
        if not self.allows(value):
            raise ValueError
        return value


def only(value: Any) -> OptionType:
    """Nothing but fairseq's default."""
    what = f"{value!r}, for anything else cannot be rebuilt"
    return OptionType(what, lambda found: type(found) is type(value) and found == value)


def whole(low: int, high: int) -> OptionType:
    """A whole number within bounds."""
    what = f"a whole number from {low} to {high}"
    return OptionType(what, lambda value: type(value) is int and low <= value <= high)


def one_word(choices: tuple[str, ...]) -> OptionType:
    """One of a few words."""
    return OptionType(f"one of {', '.join(choices)}", lambda value: type(value) is str and value in choices)


def text(what: str, allows: Callable[[str], Any]) -> OptionType:
    """Text that passes."""
    return OptionType(what, lambda value: type(value) is str and bool(allows(value)))


FLAG = OptionType("true or false", lambda value: type(value) is bool)
NAMED = text(
    "a name of up to 64 letters, digits, _ and -", NAME.fullmatch
)  # fairseq puts it into file names
# such as 0,2,4, which fairseq itself splits
NUMERALS = text(
    "whole numbers separated by commas", lambda value: len(value) <= 4096 and _NUMERALS.fullmatch(value)
)
# where a checkpoint's dictionaries lie
FOLDER = text(
    "a folder of this machine", lambda value: not any(part in value for part in ("${", "://", "\0"))
)


class Number(OptionType):
    """A number within bounds, also as the text in which a command line hands it out."""

    def __init__(self, low: float, high: float) -> None:
        in_bounds = lambda value: type(value) in (int, float) and isfinite(value) and low <= value <= high  # noqa: E731
        super().__init__(f"a number from {low} to {high}", in_bounds)

    def read(self, value: Any) -> float:
        """The number."""
        return super().read(float(value) if type(value) is str and len(value) < 32 else value)


class Cutoffs(OptionType):
    """Where the bands of an adaptive softmax end. As text fairseq evaluates it: it gets the list."""

    def __init__(self) -> None:
        super().__init__("up to 64 rising whole numbers", _are_rising)

    def read(self, value: Any) -> list[int]:
        """The list."""
        if type(value) is str:
            value = [int(part) for part in NUMERALS.read(value).strip("[]").split(",")]
        return super().read(value)


def _are_rising(value: Any) -> bool:
    if type(value) is not list or not 0 < len(value) <= 64 or any(type(n) is not int for n in value):
        return False
    return 1 <= value[0] and value[-1] <= 1 << 30 and all(a < b for a, b in zip(value, value[1:]))


class RecipeText(OptionType):
    """A recipe as JSON text, as a checkpoint holds it, never the path of one."""

    def __init__(self) -> None:
        super().__init__("a recipe as JSON text without interpolation", lambda value: "${" not in value)

    def read(self, value: Any) -> str:
        """The text, written anew."""
        try:
            data = json.loads(value) if type(value) is str else None
        except RecursionError:
            raise ValueError from None
        if type(data) is not dict:
            raise ValueError
        return super().read(json.dumps(data))
