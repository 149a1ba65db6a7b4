"""intN: integers over the range of a tensor, an output channel or a group, in which zero is exact.

q = clamp(round(w / scale) + zero, 0, top), w' = (q - zero) * scale. Unless ranges say otherwise (ranges.py),
top = 2^bits - 1, scale = (max - min) / top with the range widened to hold 0, zero = round(-min / scale)
(Fan et al. 2020, eq. 1; Jacob et al. 2018)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from fairseq_qn.errors import BlockSizeError, NonFiniteWeight
from fairseq_qn.kernels import integers as kernel

if TYPE_CHECKING:
    from torch import Tensor

OUTWARD = 1 - 2**-20  # both ends of a range round outward: without it a symmetric range can lose a level


@dataclass(frozen=True)
class Integers:
    """levels uint8 [n_ranges, values a range], scale fp32 [n_ranges], zero uint8 [n_ranges]."""

    levels: Tensor
    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Ranges:
    """How weights become levels 0 .. top, by range; scale and zero fp32 [n_ranges, 1].

    signs: +-scale, levels 0 and 2. holding: each range holds its weights, so that none is to be clamped at
    its lower end.
    """

    scale: Tensor
    zero: Tensor
    top: int
    signs: bool = False
    holding: bool = False

    @property
    def step(self) -> Tensor:
        """What a weight is divided by."""
        return self.scale * OUTWARD if self.holding else self.scale


def ranges_shape(
    shape: Sequence[int], granularity: str, group_size: int, name: str = "weight"
) -> tuple[int, int]:
    """[n_ranges, values a range] of a weight: one range for the tensor, for each row, or for `group_size`
    values of a row.

    >>> [ranges_shape((4, 128), granularity, 64) for granularity in ("tensor", "channel", "group")]
    [(1, 512), (4, 128), (8, 64)]
    """
    numel = prod(shape)
    if granularity == "tensor":
        return 1, numel
    row = numel // shape[0]
    if granularity == "channel":
        return shape[0], row
    if row % group_size:
        raise BlockSizeError(
            f"{name}: group_size has to divide the {row} weights of a row, found {group_size}"
        )
    return numel // group_size, group_size


def quantize(
    weight: Tensor,
    bits: int,
    granularity: str = "channel",
    group_size: int = 64,
    name: str = "weight",
    ranges: Ranges | None = None,
) -> Integers:
    """Integers of 2^bits levels, 2 <= bits <= 8, or by `ranges`. Raises NonFiniteWeight, BlockSizeError.

    >>> found = quantize(torch.tensor([[-3.0, 0.0, 2.0, 6.0]]), bits=2)
    >>> found.levels.tolist(), found.scale.tolist(), found.zero.tolist()
    ([[0, 1, 2, 3]], [3.0], [1])
    """
    rows = rows_of(weight, granularity, group_size, name)
    found = minmax(rows, bits) if ranges is None else ranges
    if not bool(torch.isfinite(found.scale).all()):
        raise NonFiniteWeight(f"{name}: holds NaN or Inf; quantise a finite weight")
    levels = steps_of(rows, found).add_(found.zero)
    return Integers(levels.to(torch.uint8), found.scale.squeeze(1), found.zero.squeeze(1).to(torch.uint8))


def dequantize(
    integers: Integers, shape: Sequence[int], dtype: torch.dtype | None = None, out: Tensor | None = None
) -> Tensor:
    """The weight that the integers stand for, by default in fp32; `out`, fp32 and contiguous, may be where
    it is worked out.

    >>> dequantize(quantize(torch.tensor([[-3.0, 0.0, 2.0, 6.0]]), bits=2), (2, 2)).tolist()
    [[-3.0, 0.0], [3.0, 6.0]]
    """
    levels, scale, zero = integers.levels, integers.scale, integers.zero
    if kernel.usable(levels, scale):
        found = kernel.dequantize(levels, scale, zero, out)
    else:
        found = levels.float().sub_(zero.float().unsqueeze(1)).mul_(scale.unsqueeze(1))
    return found.reshape(tuple(shape)).to(dtype or torch.float32)


def fake_quantize(
    weight: Tensor,
    bits: int,
    granularity: str = "channel",
    group_size: int = 64,
    name: str = "weight",
    ranges: Ranges | None = None,
) -> Tensor:
    """dequantize(quantize(weight)), of the same shape and dtype, but NaN for a range that holds NaN or Inf.

    For a read in each forward pass: it waits for no GPU, and takes no memory but the result's (fp32).

    >>> fake_quantize(torch.tensor([[-3.0, 0.0, 2.0, 6.0]]), bits=2).tolist()
    [[-3.0, 0.0, 3.0, 6.0]]
    """
    rows = rows_of(weight, granularity, group_size, name)
    found = minmax(rows, bits) if ranges is None else ranges
    return steps_of(rows, found).mul_(found.scale).reshape(weight.shape).to(weight.dtype)


def fake_quantize_some(
    weight: Tensor,
    masks: Iterable[Tensor],
    bits: int,
    granularity: str = "channel",
    group_size: int = 64,
    name: str = "weight",
    ranges: Ranges | None = None,
) -> Tensor:
    """fake_quantize(weight) where the parts of a mask, bool [n] one after the other, say so; the weight
    elsewhere.

    >>> masks = torch.tensor([True, True]), torch.tensor([False, True])
    >>> fake_quantize_some(torch.tensor([[-3.0, 0.0, 2.0, 6.0]]), masks, bits=2).tolist()
    [[-3.0, 0.0, 2.0, 6.0]]
    """
    if weight.dtype == torch.float64:  # which fp32 would round elsewhere too
        mask = torch.cat([part.clone() for part in masks]).view(weight.shape)
        phi = fake_quantize(weight, bits, granularity, group_size, name, ranges)
        return torch.where(mask, phi, weight.detach())
    rows = rows_of(weight, granularity, group_size, name).contiguous()
    found = minmax(rows, bits) if ranges is None else ranges
    if found.holding and kernel.usable(rows, found.scale):
        out, begin = torch.empty_like(rows), 0
        steps = torch.stack([found.step, found.scale, found.top - found.zero]).squeeze(2)
        for mask in masks:
            kernel.noise(rows, mask, begin, steps, out)
            begin += len(mask)
        return out.reshape(weight.shape).to(weight.dtype)
    out, old, begin = steps_of(rows, found).mul_(found.scale), rows.view(-1), 0
    for mask in masks:
        part = out.view(-1)[begin : begin + len(mask)]
        torch.where(mask, part, old[begin : begin + len(mask)], out=part)
        begin += len(mask)
    return out.reshape(weight.shape).to(weight.dtype)


def rows_of(weight: Tensor, granularity: str, group_size: int, name: str = "weight") -> Tensor:
    """The weight as fp32 [n_ranges, values a range]."""
    return weight.detach().float().reshape(ranges_shape(weight.shape, granularity, group_size, name))


def minmax(rows: Tensor, bits: int) -> Ranges:
    """Ranges that hold all of each row of fp32 [n_ranges, values a range], and 0."""
    top = 2**bits - 1
    low, high = rows.amin(1, keepdim=True).clamp_(max=0), rows.amax(1, keepdim=True).clamp_(min=0)
    # divided first: 3e38 - -3e38 overflows
    scale = (high / top - low / top).clamp_(min=torch.finfo(torch.float32).tiny)
    return Ranges(scale, (-low / (scale * OUTWARD)).round_().clamp_(0, top), top, holding=True)


def steps_of(rows: Tensor, ranges: Ranges) -> Tensor:
    """Levels above zero, -zero .. top - zero, as fp32."""
    if ranges.signs:
        return torch.where(rows < 0, -1.0, 1.0)
    steps, high = (rows / ranges.step).round_(), ranges.top - ranges.zero
    return steps.clamp_max_(high) if ranges.holding else steps.clamp_(-ranges.zero, high)
