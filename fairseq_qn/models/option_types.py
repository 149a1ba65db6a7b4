"""What an option may be: a flag, a number within bounds, ...; never code or an interpolation."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import isfinite
from typing import Any

NAME = re.compile(r"[\w-]{1,64}")


class OptionType:
    """What an option may be. `read` returns the value as fairseq is to get it, or raises ValueError."""

    def read(self, value: Any) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class Only(OptionType):
    """Nothing but fairseq's default."""

    value: Any

    def __str__(self) -> str:
        return f"{self.value!r}, for anything else cannot be rebuilt"

    def read(self, value: Any) -> Any:
        if type(value) is not type(self.value) or value != self.value:
            raise ValueError
        return value


@dataclass(frozen=True)
class Flag(OptionType):
    def __str__(self) -> str:
        return "true or false"

    def read(self, value: Any) -> bool:
        if type(value) is not bool:
            raise ValueError
        return value


@dataclass(frozen=True)
class Whole(OptionType):
    low: int
    high: int

    def __str__(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def read(self, value: Any) -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            raise ValueError
        return value


@dataclass(frozen=True)
class Number(OptionType):
    low: float
    high: float

    def __str__(self) -> str:
        return f"a number from {self.low} to {self.high}"

    def read(self, value: Any) -> float:
        if type(value) is str and len(value) < 32:  # as a command line hands it out
            value = float(value)
        if type(value) not in (int, float) or not isfinite(value) or not self.low <= value <= self.high:
            raise ValueError
        return value


@dataclass(frozen=True)
class OneOf(OptionType):
    choices: tuple[str, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(self.choices)}"

    def read(self, value: Any) -> str:
        if type(value) is not str or value not in self.choices:
            raise ValueError
        return value


@dataclass(frozen=True)
class Named(OptionType):
    """A plain name: of a head or a language, which fairseq puts into file names."""

    def __str__(self) -> str:
        return "a name of up to 64 letters, digits, _ and -"

    def read(self, value: Any) -> str:
        if type(value) is not str or not NAME.fullmatch(value):
            raise ValueError
        return value


@dataclass(frozen=True)
class Numerals(OptionType):
    """Text such as 0,2,4, which fairseq itself splits."""

    def __str__(self) -> str:
        return "whole numbers separated by commas"

    def read(self, value: Any) -> str:
        if (
            type(value) is not str
            or len(value) > 4096
            or not re.fullmatch(r"\[?\d{1,9}(, ?\d{1,9})*\]?", value, re.ASCII)
        ):
            raise ValueError
        return value


@dataclass(frozen=True)
class Cutoffs(OptionType):
    """Where the bands of an adaptive softmax end. As text fairseq evaluates it: it gets the list."""

    def __str__(self) -> str:
        return "up to 64 rising whole numbers"

    def read(self, value: Any) -> list[int]:
        if type(value) is str:
            value = [int(part) for part in Numerals().read(value).strip("[]").split(",")]
        if type(value) is not list or not 0 < len(value) <= 64 or any(type(n) is not int for n in value):
            raise ValueError
        if value[0] < 1 or value[-1] > 1 << 30 or any(a >= b for a, b in zip(value, value[1:])):
            raise ValueError
        return value


@dataclass(frozen=True)
class RecipeText(OptionType):
    """A recipe as JSON text, as a checkpoint holds it, never the path of one."""

    def __str__(self) -> str:
        return "a recipe as JSON text without interpolation"

    def read(self, value: Any) -> str:
        try:
            data = json.loads(value) if type(value) is str else None
        except RecursionError:
            raise ValueError from None
        text = json.dumps(data)
        if type(data) is not dict or "${" in text:
            raise ValueError
        return text


@dataclass(frozen=True)
class Folder(OptionType):
    """Where a checkpoint's dictionaries lie on this machine."""

    def __str__(self) -> str:
        return "a folder of this machine"

    def read(self, value: Any) -> str:
        if type(value) is not str or "${" in value or "://" in value or "\0" in value:
            raise ValueError
        return value
