"""Multiplication of integers by a positive real number, in integers alone (Jacob et al. 2018, 2.2).

M = 2^-n M0, M0 in [0.5, 1), is kept as the int32 nearest to 2^31 M0 and the shift n. x M is then a
doubling high multiply, round(x M0), and a right shift by n, each rounded to the nearest, halves away from
zero. Results past an end of int32 become that end.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp, isfinite
from typing import TYPE_CHECKING

import torch

from fairseq_qn.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

LOW, HIGH = -(2**31), 2**31 - 1
SHIFTS = (-31, 62)  # past which every product is an end of int32, or 0


@dataclass(frozen=True)
class Multiplier:
    """factor int32, the nearest to 2^31 M0; shift int32, n. Of one shape, which broadcasts against x."""

    factor: Tensor
    shift: Tensor


def multiplier(values: Tensor) -> Multiplier:
    """Of real numbers >= 0 in float64, of any shape. Raises UnsupportedError for others.

    >>> found = multiplier(torch.tensor([0.75, 0.0078125, 3.0], dtype=torch.float64))
    >>> found.factor.tolist(), found.shift.tolist()
    ([1610612736, 1073741824, 1610612736], [0, 6, -2])
    """
    pairs = [_fixed(value) for value in values.reshape(-1).tolist()]
    factor, shift = torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2).unbind(1)
    return Multiplier(factor.reshape(values.shape).clone(), shift.reshape(values.shape).clone())


def high_multiply(x: Tensor, factor: Tensor) -> Tensor:
    """round(x factor / 2^31) of int32 tensors, halves away from zero, saturated to int32.

    >>> high_multiply(torch.tensor([7, -7]).int(), torch.tensor(2**30).int()).tolist()
    [4, -4]
    """
    return _saturated(_shifted(x.long() * factor.long(), torch.tensor(31)))


def rounding_shift(x: Tensor, n: Tensor) -> Tensor:
    """round(x / 2^n) of int32, halves away from zero; n from 0 to 62.

    >>> rounding_shift(torch.tensor([5, 6, -6]).int(), torch.tensor(2)).tolist()
    [1, 2, -2]
    """
    return _shifted(x.long(), n.long()).int()


def rescale(x: Tensor, by: Multiplier) -> Tensor:
    """x M of int32, saturated to int32.

    Where M >= 1 (n < 0) there is no second rounding: round(x factor / 2^(31 + n)).
    """
    left = by.shift.long().clamp(max=0)
    product = _saturated(_shifted(x.long() * by.factor.long(), 31 + left))
    return rounding_shift(product, by.shift.clamp(min=0))


def requantize(x: Tensor, by: Multiplier, zero: int) -> Tensor:
    """Accumulators int32 -> uint8, x M + zero, saturated.

    >>> x = torch.tensor([-1000, -4, 4, 1000]).int()
    >>> requantize(x, multiplier(torch.tensor(0.5, dtype=torch.float64)), zero=10).tolist()
    [0, 8, 12, 255]
    """
    return (rescale(x, by).long() + zero).clamp(0, 255).to(torch.uint8)


def _fixed(value: float) -> tuple[int, int]:
    if not (isfinite(value) and value >= 0):
        raise UnsupportedError(f"multiplier: expected a finite number, 0 or above, found {value}")
    mantissa, exponent = frexp(value)  # value = mantissa 2^exponent, mantissa in [0.5, 1) or 0
    factor = round(mantissa * 2**31)
    if factor == 2**31:
        factor, exponent = 2**30, exponent + 1
    if -exponent < SHIFTS[0]:
        return HIGH, SHIFTS[0]
    return factor, min(-exponent, SHIFTS[1])


def _shifted(x: Tensor, n: Tensor) -> Tensor:
    """round(x / 2^n), int64, halves away from zero; |x| + 2^(n - 1) < 2^63."""
    return x.sign() * ((x.abs() + ((1 << n) >> 1)) >> n)


def _saturated(x: Tensor) -> Tensor:
    return x.clamp(LOW, HIGH).int()
