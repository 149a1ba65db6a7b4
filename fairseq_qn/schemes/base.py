"""What the rest of the house asks of a scheme, so that nothing else asks which scheme it has.

    Scheme   its lines of a recipe, what is read in training, how it is learned, how it lies in the file
    Site     what a scheme may know of a weight that trains; a weight view is one
    Stored   a weight as the file holds it

To add a scheme: a subclass of Scheme and one of Stored in a file of their own, and their name in SCHEMES.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

import torch

from fairseq_qn.quant import reading

if TYPE_CHECKING:
    from torch import Tensor

Entry = dict[str, Any]  # a weight's record in the manifest: plain data
Specs = dict[str, tuple[str, tuple[int, ...]]]
EXPONENTS = (-1000, 1000)  # of two, which an entry may name
T = TypeVar("T")


@dataclass(frozen=True)
class Draw:
    """The noise of one pass: its kind, proxy or exact, the probability p of each of its units, the seed."""

    kind: str
    p: float
    seed: int


class Site(Protocol):
    """A weight that trains, as its scheme sees it."""

    name: str
    padding_idx: int | None

    @property
    def shape(self) -> Sequence[int]:
        """Of the weight."""

    def buffer(self, name: str) -> Tensor:
        """One of the buffers that the scheme asked for."""

    def parameter(self, name: str) -> Tensor:
        """One of the Parameters that the scheme asked for."""

    def derived(self, name: str, compute: Callable[[Tensor], T]) -> T:
        """compute(buffer), kept until the buffer changes."""


@dataclass(frozen=True)
class Stored(ABC):
    """A weight of this shape as the file holds it: the tensors named in TENSORS, and what else it takes."""

    TENSORS: ClassVar[tuple[str, ...]]  # its fields that are tensors, or None; a packed module's buffers
    PREFIX: ClassVar[str]  # of the names of packed modules: PQ makes PQLinear

    shape: tuple[int, ...]

    def tensors(self) -> dict[str, Tensor | None]:
        """By name."""
        return {name: getattr(self, name) for name in self.TENSORS}

    def holding(self, tensors: Mapping[str, Tensor | None]) -> Stored:
        """The same with these tensors in the place of its own."""
        own: dict[str, Any] = {name: tensors[name] for name in self.TENSORS}
        return replace(self, **own)

    @property
    def like(self) -> Tensor:
        """A tensor of the weight's dtype and device."""
        return next(t for t in self.tensors().values() if t is not None and t.is_floating_point())

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight; by default in the dtype of `like`."""

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """Rows of a table: integers of any shape -> [..., embedding_dim]."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """F.linear(x, weight, bias) in x's dtype without the dense weight; None where it has to be decoded.

        autograd must not record it.
        """
        return None

    def signed(self) -> tuple[Tensor, Tensor] | None:
        """(levels int8 of the weight's shape, -127 to 127, scale [1] or [out]) whose product is the weight;
        None where it is no such product.
        """
        return None


@dataclass(frozen=True)
class Scheme(ABC):
    """One way to quantise a weight. Its fields are its own lines of a recipe."""

    name: ClassVar[str]
    # what training keeps beside the weight: codes, which mean nothing when averaged, and what is learned by
    # gradients. All that the class knows; which of them one scheme keeps, `buffers` and `parameters` say
    buffer_names: ClassVar[tuple[str, ...]] = ()
    parameter_names: ClassVar[tuple[str, ...]] = ()
    rated_names: ClassVar[
        tuple[str, ...]
    ] = ()  # those Parameters that may have a learning rate of their own
    rounds_in_evaluation: ClassVar[bool] = False  # evaluation reads `frozen` before anything is frozen
    coded_parts: ClassVar[tuple[str, ...]] = ()  # parts in the file that a report counts as codes
    shares_gradients: ClassVar[bool] = False  # frozen, entries of a weight move together: see `moment`

    # -- recipe

    @classmethod
    @abstractmethod
    def parse(cls, fields: Mapping[str, Any], where: str) -> Scheme:
        """From its lines of a rule. Raises RecipeError."""

    @abstractmethod
    def check(self, shape: Sequence[int], name: str) -> None:
        """Raise BlockSizeError for a weight of a shape that it cannot quantise."""

    # -- training; w is the site's weight

    def buffers(self, shape: Sequence[int], padding_idx: int | None) -> dict[str, Tensor]:
        """The buffers that it keeps, of `buffer_names`, as they are before anything is learned."""
        return {}

    def parameters(self, shape: Sequence[int]) -> dict[str, Tensor]:
        """What it learns by gradients beside the weight, of `parameter_names`, as it is before the first.

        The optimizer sees them as Parameters of the layer. Weight decay passes them over where the package
        knows the optimizer: under fairseq, `follow` and `Stages`.
        """
        return {}

    @abstractmethod
    def quantized(self, w: Tensor, site: Site) -> Tensor:
        """phi(w), exact: by what was learned, without noise or gradient."""

    @abstractmethod
    def noised(self, w: Tensor, site: Site, draw: Draw) -> Tensor:
        """What training reads: w + m * (phi(w) - w), differentiable (Fan et al. 2020, eq. 4-6)."""

    def frozen(self, w: Tensor, site: Site) -> Tensor:
        """What is read once frozen, differentiable; straight through unless a scheme knows better."""
        return reading.read(w, lambda weight: self.quantized(weight, site), None)

    def needs_learning(self, kind: str) -> bool:
        """Whether noise of this kind draws on what `learn` leaves in the buffers."""
        return False

    def learn(self, w: Tensor, site: Site, warm: bool, iterations: int, seed: int) -> float:
        """Learn from w what the buffers hold, starting from it if `warm`; returns the distortion."""
        return distortion(w, self.quantized(w, site))

    def moment(self, moment: Tensor, site: Site, *, squared: bool) -> Tensor:
        """A moment of Adam, or one of squares, as it has to be once frozen, where `shares_gradients`."""
        return moment

    def misfit(self, found: Mapping[str, Tensor], site: Site) -> str | None:
        """Why the values of these buffers are none that it learns, or None."""
        return None

    def size(self, site: Site, rounded: bool) -> Tensor | None:
        """Bits in the file, differentiable, fp32, of a weight whose scheme learns them; else None.

        rounded: as the file has them, straight through; else by what is learned, whole or not.
        """
        return None

    @abstractmethod
    def fingerprint(self, site: Site) -> dict[str, int]:
        """Up to three numbers that say how the buffers were learned."""

    # -- file

    @abstractmethod
    def entry(self, w: Tensor, site: Site, dtype: torch.dtype, learned: bool) -> Entry:
        """The manifest's record, floating-point parts in `dtype`; what is learned still is guessed."""

    @classmethod
    @abstractmethod
    def check_entry(cls, entry: Entry) -> str | None:
        """What is wrong with a record whose shape is sound, or None; any of its values may be anything."""

    @classmethod
    @abstractmethod
    def layout(cls, entry: Entry, dtype: str) -> Specs:
        """part -> (dtype, shape) of the tensors that stand for the weight, floating-point parts in `dtype`;
        dtypes by name: "float16".
        """

    @abstractmethod
    def encode(self, w: Tensor, site: Site, dtype: torch.dtype) -> tuple[Entry, dict[str, Tensor]]:
        """(record, parts) of a frozen weight."""

    @classmethod
    @abstractmethod
    def decode(cls, entry: Entry, parts: Mapping[str, Tensor]) -> Stored:
        """The weight of a record and parts that were checked by `check_entry` and `layout`.

        Raises FormatError for codes without a meaning, and for NaN or Inf.
        """

    @classmethod
    def code_bits(cls, entry: Entry) -> int:
        """Bits of a code in its coded parts, by which an entropy coder counts them; 8: bytes."""
        return 8

    @classmethod
    @abstractmethod
    def label(cls, entry: Entry) -> str:
        """In a few letters."""

    def finite(self, w: Tensor, site: Site) -> bool:
        """Whether `encode` would store numbers alone."""
        return bool(torch.isfinite(self.quantized(w, site)).all())


def distortion(w: Tensor, quantized: Tensor) -> float:
    """||w - w'||^2 / ||w||^2.

    >>> distortion(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.0]))
    0.04
    """
    norm = w.double().pow(2).sum()
    error = (w.double() - quantized.double()).pow(2).sum()
    return float(error / norm) if norm > 0 else 0.0


def all_whole(entry: Entry, bounds: Mapping[str, tuple[int, int]]) -> bool:
    """Whether these fields of a record are whole numbers within their bounds."""
    found = ((entry.get(key), low, high) for key, (low, high) in bounds.items())
    return all(type(value) is int and low <= value <= high for value, low, high in found)
