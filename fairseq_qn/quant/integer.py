"""intN: affine integers over the range of a tensor, an output channel or a group, in which zero is exact.

scale = (max - min) / (2^bits - 1) with the range widened to hold 0, zero = round(-min / scale),
q = clamp(round(w / scale) + zero, 0, 2^bits - 1), w' = (q - zero) * scale
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
    weight: Tensor, bits: int, granularity: str = "channel", group_size: int = 64, name: str = "weight"
) -> Integers:
    """Integers of 2^bits levels, 2 <= bits <= 8. Raises NonFiniteWeight, BlockSizeError.

    >>> found = quantize(torch.tensor([[-3.0, 0.0, 2.0, 6.0]]), bits=2)
    >>> found.levels.tolist(), found.scale.tolist(), found.zero.tolist()
    ([[0, 1, 2, 3]], [3.0], [1])
    """
    rows = _rows(weight, granularity, group_size, name)
    scale, zero = _affine(rows, bits)
    if not bool(torch.isfinite(scale).all()):
        raise NonFiniteWeight(f"{name}: holds NaN or Inf; quantise a finite weight")
    levels = _steps(rows, scale, zero, bits).add_(zero)
    return Integers(levels.to(torch.uint8), scale.squeeze(1), zero.squeeze(1).to(torch.uint8))


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
    weight: Tensor, bits: int, granularity: str = "channel", group_size: int = 64, name: str = "weight"
) -> Tensor:
    """dequantize(quantize(weight)), of the same shape and dtype, but NaN for a range that holds NaN or Inf.

    For a read in each forward pass: it waits for no GPU, and takes no memory but the result's (fp32).

    >>> fake_quantize(torch.tensor([[-3.0, 0.0, 2.0, 6.0]]), bits=2).tolist()
    [[-3.0, 0.0, 3.0, 6.0]]
    """
    rows = _rows(weight, granularity, group_size, name)
    scale, zero = _affine(rows, bits)
    return _steps(rows, scale, zero, bits).mul_(scale).reshape(weight.shape).to(weight.dtype)


def fake_quantize_some(
    weight: Tensor,
    masks: Iterable[Tensor],
    bits: int,
    granularity: str = "channel",
    group_size: int = 64,
    name: str = "weight",
) -> Tensor:
    """fake_quantize(weight) where the parts of a mask, bool [n] one after the other, say so; the weight
    elsewhere.

    >>> masks = torch.tensor([True, True]), torch.tensor([False, True])
    >>> fake_quantize_some(torch.tensor([[-3.0, 0.0, 2.0, 6.0]]), masks, bits=2).tolist()
    [[-3.0, 0.0, 2.0, 6.0]]
    """
    if weight.dtype == torch.float64:  # which fp32 would round elsewhere too
        mask = torch.cat([part.clone() for part in masks]).view(weight.shape)
        return torch.where(mask, fake_quantize(weight, bits, granularity, group_size, name), weight.detach())
    rows = _rows(weight, granularity, group_size, name).contiguous()
    scale, zero = _affine(rows, bits)
    if kernel.usable(rows, scale):
        out, begin = torch.empty_like(rows), 0
        steps = torch.stack([scale * OUTWARD, scale, 2**bits - 1 - zero]).squeeze(2)
        for mask in masks:
            kernel.noise(rows, mask, begin, steps, out)
            begin += len(mask)
        return out.reshape(weight.shape).to(weight.dtype)
    out, old, begin = _steps(rows, scale, zero, bits).mul_(scale), rows.view(-1), 0
    for mask in masks:
        part = out.view(-1)[begin : begin + len(mask)]
        torch.where(mask, part, old[begin : begin + len(mask)], out=part)
        begin += len(mask)
    return out.reshape(weight.shape).to(weight.dtype)


def _rows(weight: Tensor, granularity: str, group_size: int, name: str) -> Tensor:
    """The weight as fp32 [n_ranges, values a range]."""
    return weight.detach().float().reshape(ranges_shape(weight.shape, granularity, group_size, name))


def _affine(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale, zero) of each range, both fp32 [n_ranges, 1]."""
    top = 2**bits - 1
    low, high = rows.amin(1, keepdim=True).clamp_(max=0), rows.amax(1, keepdim=True).clamp_(min=0)
    # divided first: 3e38 - -3e38 overflows
    scale = (high / top - low / top).clamp_(min=torch.finfo(torch.float32).tiny)
    return scale, (-low / (scale * OUTWARD)).round_().clamp_(0, top)


def _steps(rows: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Levels above zero, -zero .. 2^bits - 1 - zero, as fp32. No clamp at the lower end: `zero` is where it
    rounds to.
    """
    return (rows / (scale * OUTWARD)).round_().clamp_max_(2**bits - 1 - zero)
