"""Rounding of what goes into a layer: affine levels over a range, in which zero is exact.

scale = (high - low) / (2^bits - 1), zero = round(-low / scale); a value becomes
(clamp(round(x / scale) + zero, 0, 2^bits - 1) - zero) * scale (Jacob et al. 2018, 2.1 and 3.1). Numbers
past an end become that end, NaN stays NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def span(x: Tensor, axes: int) -> tuple[Tensor, Tensor]:
    """(low, high), the ends of x over its last `axes` dimensions, which stay as 1; in fp32 at least.

    >>> [end.tolist() for end in span(torch.tensor([[-1.0, 3.0], [0.0, 5.0]]), axes=1)]
    [[[-1.0], [0.0]], [[3.0], [5.0]]]
    """
    dims = tuple(range(-min(axes, x.dim()), 0))
    wide = _wide(x)
    return wide.amin(dims, keepdim=True), wide.amax(dims, keepdim=True)


def affine(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(scale, zero) of the levels of a range that holds 0."""
    top = 2**bits - 1
    # divided first: 3e38 - -3e38 overflows
    scale = (high / top - low / top).clamp_(min=torch.finfo(torch.float32).tiny)
    return scale, (-low / scale).round_().clamp_(0, top)


def rounded(x: Tensor, low: Tensor, high: Tensor, bits: int, mask: Tensor | None = None) -> Tensor:
    """x at the 2^bits levels of a range that is widened to hold 0; x itself where a mask of its shape is
    False.

    low, high: as `span` gives them, or scalars. The gradient is that of the identity, but 0 for a value past
    an end of its range (Jacob et al. 2018, 3).

    >>> low, high = torch.tensor(-1.0), torch.tensor(2.0)
    >>> rounded(torch.tensor([-9.0, -0.4, 0.0, 0.6, 9.0]), low, high, bits=2).tolist()
    [-1.0, 0.0, 0.0, 1.0, 2.0]
    """
    top = 2**bits - 1
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale, zero = affine(low, high, bits)
    wide = _wide(x)
    levels: Tensor = (wide / scale).round_().clamp(-zero, top - zero).mul_(scale).to(x.dtype)
    if mask is not None:
        levels = torch.where(mask, levels, x.detach())
    if not torch.is_grad_enabled():
        return levels
    inside = (wide >= low) & (wide <= high)
    inside = inside if mask is None else inside | ~mask
    # ordinary operations, which add 0 to the levels and give them a gradient: any transform may record them
    return levels + torch.where(inside, x - x.detach(), 0)


def _wide(x: Tensor) -> Tensor:
    """Detached, in fp32 at least."""
    wide: Tensor = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    return wide
