"""A network's operations on integers alone (Jacob et al. 2018, 2.1 to 2.4 and appendix A).

An array stands for scale (q - zero). What a layer reads is uint8 with a zero, its weight int8 within
+-127 of zero 0, its bias and what it gives int32, of scale S1 S2 and zero 0. What lies between layers
(ReLU as a clamp, pooling, sums) is int32 of zero 0. A scale is of a tensor, or of each channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from fairseq_qn.quant.fixed_point import HIGH, LOW, Multiplier, rescale

if TYPE_CHECKING:
    from torch import Tensor

Pair = tuple[int, int]
BIAS = 2**30  # the largest, which leaves as much to the products


def centred(q: Tensor, zero: int) -> Tensor:
    """uint8 -> int32 of zero 0."""
    return q.int() - zero


def linear(q: Tensor, zero: int, weight: Tensor, bias: Tensor) -> Tensor:
    """uint8 [batch, in], int8 [out, in], int32 [out] -> int32 [batch, out]."""
    return centred(q, zero) @ weight.int().t() + bias


def conv2d(
    q: Tensor,
    zero: int,
    weight: Tensor,
    bias: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Tensor:
    """uint8 [batch, in, h, w], int8 [out, in / groups, kh, kw], int32 [out] -> int32 [batch, out, h', w'].

    padding: left, right, top, bottom, with what stands for 0.0; the rest as F.conv2d, which knows few
    integers.
    """
    out, _, *kernel = weight.shape
    rows = weight.int().reshape(groups, out // groups, -1)
    x = torch.constant_pad_nd(centred(q, zero), [*padding], 0)
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        x = x.unfold(axis, (size - 1) * gap + 1, step)[..., ::gap]
    batch, _, height, width = x.shape[:4]
    columns = x.permute(0, 1, 4, 5, 2, 3).reshape(batch, groups, rows.shape[2], height * width)
    return (rows @ columns).reshape(batch, out, height, width) + bias.view(-1, 1, 1)


def fold(weight: Tensor, scale: Tensor, bias: Tensor, gain: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(weight int8, bias int32 [out], scale [out]) of gain (scale weight) + bias, by output channel.

    weight int8 [out, ...], of scale S1 S2; scale, bias, gain float64 [out]. A gain, as of batch norm, goes
    into the scale, and its sign into the weight: integers of one symmetric range a channel are those of the
    folded weight. Where a bias would pass 2^30, as of a gain of nearly 0, the scale is made coarser.

    >>> two = torch.tensor([2.0, 2.0]).double()
    >>> found = fold(torch.tensor([[3], [5]]).int(), two, two * 6, torch.tensor([1.0, -1.0]).double())
    >>> [tensor.tolist() for tensor in found]
    [[[3], [-5]], [6, 6], [2.0, 2.0]]
    """
    exact = scale * gain
    coarse = torch.maximum(exact.abs(), bias.abs() / BIAS)
    coarse = torch.where(coarse > 0, coarse, 1.0)
    part = (exact / coarse).view(-1, *[1] * (weight.dim() - 1))
    return (weight * part).round().to(torch.int8), (bias / coarse).round().int(), coarse


def fits(weight: Tensor, bias: Tensor) -> bool:
    """Whether no accumulator of a layer can pass an end of int32, whatever it reads."""
    return bool((weight.long().abs().flatten(1).sum(1) * 255 + bias.long().abs() <= HIGH).all())


def add(a: Tensor, b: Tensor, by_a: Multiplier, by_b: Multiplier) -> Tensor:
    """int32 + int32, each brought to the scale of the sum, saturated."""
    return (rescale(a, by_a).long() + rescale(b, by_b).long()).clamp(LOW, HIGH).int()


def average_pool2d(x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
    """int32 -> int32: means of windows, to the nearest, halves away from zero; padding counts as zeros."""
    total = F.avg_pool2d(x.long(), kernel, stride, padding, divisor_override=1)
    return _divided(total, kernel[0] * kernel[1])


def average_all(x: Tensor) -> Tensor:
    """int32 [..., h, w] -> int32 [..., 1, 1]: the mean, rounded as of a window."""
    return _divided(x.long().sum((-2, -1), keepdim=True), x.shape[-2] * x.shape[-1])


def _divided(total: Tensor, n: int) -> Tensor:
    return (total.sign() * ((total.abs() + n // 2) // n)).int()
