"""Schemes of activations: what the input of a module goes through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


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


@dataclass(frozen=True)
class Identity(Activation):
    """Lets everything through: it shows the way of the others."""

    name = "identity"

    def __call__(self, x: Tensor) -> Tensor:
        """x."""
        return x

    @classmethod
    def check_entry(cls, entry: dict[str, Any]) -> str | None:
        """It has no fields."""
        return None if entry.keys() == {"scheme"} else "expected no fields"


ACTIVATIONS: dict[str, type[Activation]] = {scheme.name: scheme for scheme in (Identity,)}
