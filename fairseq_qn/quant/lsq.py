"""Learned step sizes (Esser et al. 2020): the step of a range is trained by the gradient of the loss.

w' = clamp(round(w / step), -Qn, Qp) * step                                        (eq. 1, 2)
dw'/dstep = round(w / step) - w / step within the range, -Qn or Qp beyond it       (eq. 3)
dw'/dw = 1 within the range, 0 beyond it                                           (eq. 5)
first step 2 <|w|> / sqrt(Qp); gradients of a step of n weights * 1 / sqrt(n Qp)   (section 2.1, 2.2)

With one bit round(w / step) is the sign and Qn = Qp = 1, as Liu et al. 2022 (BiT) extend it; the first step
is the mean size.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from typing import TYPE_CHECKING

import torch

from fairseq_qn.quant.integer import Ranges, steps_of
from fairseq_qn.quant.ranges import find, zero_and_top

if TYPE_CHECKING:
    from torch import Tensor


def first(rows: Tensor, bits: int | str) -> Ranges:
    """The first step of each range of fp32 [n_ranges, values a range].

    >>> float(first(torch.tensor([[0.5, -0.5, 1.5, -1.5]]), bits=4).scale)  # 2 * 1 / sqrt(7)
    0.755928...
    """
    zero, top = zero_and_top(bits, symmetric=True)
    mean = find(rows, "least_squares", 1, symmetric=True)
    if bits != 1 and zero is not None:
        scale = mean.scale * (2 / sqrt(top - zero))
        mean = Ranges(scale, torch.full_like(scale, zero), top)
    return replace(mean, scale=mean.scale.clamp(min=torch.finfo(torch.float32).tiny))


def moved(ranges: Ranges, change: Tensor) -> Ranges:
    """The steps after a change [n_ranges]; none falls below 1/64 of the first, where a step too large would
    take it through zero.
    """
    scale = torch.maximum(ranges.scale + change.detach().float().unsqueeze(1), ranges.scale / 64)
    return replace(ranges, scale=scale)


def gradients(
    grad: Tensor, rows: Tensor, ranges: Ranges, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(of the weights, of the steps [n_ranges]) from that of w', all but the latter [n_ranges, values].

    mask: which weights are read as w'; the others are read as they are.
    """
    ratio, lowest, highest = rows / ranges.scale, -ranges.zero, ranges.top - ranges.zero
    within = (ratio > lowest) & (ratio < highest)
    by_step = torch.where(within, steps_of(rows, ranges) - ratio, ratio.clamp(lowest, highest))
    if mask is not None:
        by_step, within = by_step * mask, within | ~mask
    scaled = (grad * by_step).sum(1) / (rows.shape[1] * highest.squeeze(1)).sqrt()
    return grad * within, scaled
