"""Floating-point values at half the bytes: fp16 and a power of two that keeps them within its range."""

from __future__ import annotations

from math import frexp, isfinite
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = ("float16", "float32")


def narrowed(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(values / 2^exponent in `dtype`, exponent); what is not floating point unchanged.

    >>> narrowed(torch.tensor([1e-9, -3e-9]), torch.float16)
    (tensor([ 0.2686, -0.8052], dtype=torch.float16), -28)
    """
    exponent = exponent_of(values, dtype)
    if exponent:
        values = torch.ldexp(values.detach().float(), torch.tensor(-exponent))
    return (values.to(dtype) if values.is_floating_point() else values), exponent


def exponent_of(values: Tensor, dtype: torch.dtype) -> int:
    """The power of two that `narrowed` takes out: 0 unless `dtype` is fp16 and would overflow or lose small
    values.

    >>> [exponent_of(torch.tensor([x]), torch.float16) for x in (1.0, 1e6, 2.0**-10)]
    [0, 20, -9]
    """
    if not values.is_floating_point() or dtype != torch.float16 or not values.numel():
        return 0
    largest = float(values.detach().abs().max())
    if largest == 0.0 or 2.0**-6 <= largest < 2.0**15 or not isfinite(largest):
        return 0
    return max(-120, min(120, frexp(largest)[1]))  # 2^120 is the most that fp32 scales by


def widened(values: Tensor, exponent: int) -> Tensor:
    """fp32 values of a narrowed tensor; what is not floating point, or fp64, unchanged.

    >>> widened(torch.tensor([0.5, -0.25], dtype=torch.float16), 20).tolist()
    [524288.0, -262144.0]
    """
    if not values.is_floating_point() or values.dtype == torch.float64:
        return values
    return torch.ldexp(values.float(), torch.tensor(exponent)) if exponent else values.float()
