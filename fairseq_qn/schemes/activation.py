"""Schemes of activations: what the input of a module goes through. Weights have rooms of their own
(base.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from fairseq_qn.errors import RecipeError
from fairseq_qn.lines import one_of, only, whole
from fairseq_qn.quant.activations import rounded, span
from fairseq_qn.schemes.base import all_whole

if TYPE_CHECKING:
    from torch import Tensor

BITS, UPDATES, AXES = (2, 8), (0, 10**9), (1, 3)
LARGEST = (2 - 2**-23) * 2.0**127  # of fp32


@dataclass(frozen=True)
class Activation(ABC):
    """Its fields are what the file keeps of it: plain data."""

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """What the module computes with in place of x, of the same shape."""

    def entry(self) -> dict[str, Any]:
        """The manifest's record."""
        return {"scheme": self.name, **asdict(self)}

    @classmethod
    @abstractmethod
    def check_entry(cls, entry: dict[str, Any]) -> str | None:
        """What is wrong with a record, or None; any of its values may be anything."""

    @classmethod
    def of_entry(cls, entry: dict[str, Any]) -> Activation:
        """From a record that was checked."""
        return cls(**{key: value for key, value in entry.items() if key != "scheme"})

    @property
    def label(self) -> str:
        """In a few letters."""
        return self.name


@dataclass(frozen=True)
class _Integers(Activation):
    bits: int

    @property
    def label(self) -> str:
        """int8 in."""
        return f"int{self.bits} in"

    @classmethod
    def check_entry(cls, entry: dict[str, Any]) -> str | None:
        """Its fields and no others, bits within bounds."""
        expected = sorted(["scheme", *(f.name for f in fields(cls))])
        if sorted(entry) != expected:
            return f"expected {', '.join(expected)}"
        return None if all_whole(entry, {"bits": BITS}) else "bits: out of range"


@dataclass(frozen=True)
class Static(_Integers):
    """Integers of `bits` over a range that training has seen."""

    name = "static"

    low: float
    high: float

    def __call__(self, x: Tensor) -> Tensor:
        """x at the levels of the range."""
        low, high = x.detach().float().new_tensor([self.low, self.high])
        return rounded(x, low, high, self.bits)

    @classmethod
    def check_entry(cls, entry: dict[str, Any]) -> str | None:
        """A range of finite fp32 numbers that holds 0."""
        if problem := super().check_entry(entry):
            return problem
        ends = entry["low"], entry["high"]
        if not all(type(end) is float and abs(end) <= LARGEST for end in ends):
            return "low, high: expected finite fp32 numbers"
        return None if ends[0] <= 0 <= ends[1] else "low, high: expected a range that holds 0"


@dataclass(frozen=True)
class Dynamic(_Integers):
    """Integers of `bits` over the range of the last `axes` dimensions: a token, or an image of Conv2d."""

    name = "dynamic"

    axes: int

    def __call__(self, x: Tensor) -> Tensor:
        """x at the levels of its own ranges."""
        return rounded(x, *span(x, self.axes), self.bits) if x.numel() else x

    @classmethod
    def check_entry(cls, entry: dict[str, Any]) -> str | None:
        """A number of dimensions."""
        problem = super().check_entry(entry)
        return problem or (None if all_whole(entry, {"axes": AXES}) else "axes: out of range")


ACTIVATIONS: dict[str, type[Activation]] = {scheme.name: scheme for scheme in (Static, Dynamic)}


@dataclass(frozen=True)
class Activations:
    """The line `activations` of a rule: the inputs of its layers in integers of `bits`.

    ranges: "dynamic", of each token anew (of each image, before a Conv2d), or "static", a moving average of
    what training sees. start: the update from which training quantises them. momentum: of the average, 0.99
    unless given; static alone has one.
    """

    bits: int = 8
    ranges: str = "dynamic"
    start: int = 0
    momentum: float | None = None

    @classmethod
    def parse(cls, data: Any, where: str) -> Activations:
        """From a mapping of its lines, or a number of bits. Raises RecipeError.

        >>> Activations.parse(8, "rules[0].activations")
        Activations(bits=8, ranges='dynamic', start=0, momentum=None)
        """
        lines = data if isinstance(data, Mapping) else {"bits": data}
        only(lines, [f.name for f in fields(cls)], where)
        whole(lines.get("bits", cls.bits), BITS, f"{where}.bits" if lines is data else where)
        one_of(lines.get("ranges", cls.ranges), (Static.name, Dynamic.name), f"{where}.ranges")
        whole(lines.get("start", cls.start), UPDATES, f"{where}.start")
        found = cls(**lines)
        m = found.momentum
        if m is not None and found.ranges != "static":
            raise RecipeError(f"{where}.momentum: not of {found.ranges} ranges; take it out")
        if m is not None and not (type(m) in (int, float) and 0 <= m < 1):
            raise RecipeError(f"{where}.momentum: expected a number from 0 to below 1, found {m!r}")
        return found
