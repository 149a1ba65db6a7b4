"""Widths that are learned with the weights: pseudo-noise stands for rounding (DiffQ, Defossez et al. 2021).

Each group of g weights has a logit l and so B = min + sigmoid(l) (max - min) bits; the range [low, high] is
the tensor's.
    training   w + step u, step = (high - low) / (2^B - 1), differentiable in l; u uniform in [-1/2, 1/2] or
               normal of deviation 1/2
    else       b = round(B); q = round((w - low) / step), 0 .. 2^b - 1, w' = low + q step
    size       sum of g b bits, whose gradient is that of g B
Levels lie evenly from one end of the range to the other, so that 0 need not be one of them: of the four of
2 bits it would take one, and leave an end of the range without.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, log
from typing import TYPE_CHECKING

import torch

from fairseq_qn.errors import FormatError
from fairseq_qn.kernels import pseudo_noise as kernel
from fairseq_qn.kernels.pseudo_noise import Draws
from fairseq_qn.quant import reading
from fairseq_qn.quant.bitpack import pack, packed_bytes, unpack
from fairseq_qn.quant.integer import OUTWARD

if TYPE_CHECKING:
    from torch import Tensor

FIRST = 8  # bits before anything is learned, as published, where the bounds allow it
NOISES = ("gaussian", "uniform")
WIDTHS = 16  # of tables by width: 0 .. 15
CHUNK = 1 << 18  # draws at a time: few enough that temporaries stay in a cache
MASK = (1 << 32) - 1


def first_logit(least: int, most: int) -> float:
    """The logit of 8 bits, or of the middle where 8 is not between the bounds.

    >>> round(first_logit(2, 15), 3), first_logit(2, 4)
    (-0.154, 0.0)
    """
    share = (FIRST - least) / max(1, most - least)
    return log(share / (1 - share)) if 0 < share < 1 else 0.0


def bits_of(logits: Tensor, least: int, most: int) -> Tensor:
    """Real-valued bits, fp32 of the logits' shape, differentiable."""
    return least + torch.sigmoid(logits.float()) * (most - least)


def widths_of(logits: Tensor, least: int, most: int) -> Tensor:
    """The bits as evaluation and the file have them: uint8, rounded."""
    return bits_of(logits.detach(), least, most).round_().to(torch.uint8)


def size_of(bits: Tensor, size: int) -> Tensor:
    """Bits of groups of `size` weights, whole or real-valued, fp32 [n_groups], and of their widths.

    >>> size_of(torch.tensor([2.0, 3.0, 5.0]), size=16)  # 160, and 2 bits for each width
    tensor(166.)
    """
    low, high = torch.aminmax(bits.detach().round())
    return size * bits.sum() + len(bits) * torch.frexp(high - low).exponent


def range_of(weight: Tensor) -> Tensor:
    """fp32 [2]: the least and the greatest weight."""
    return torch.stack(torch.aminmax(weight.detach())).float()


def _uniform(bits: Tensor) -> Tensor:
    return (bits >> 8).float() * 2**-24 - (0.5 - 2**-25)


def _gaussian(bits: Tensor) -> Tensor:
    """The sum of four bytes, bent to the normal distribution: its fourth moment is 2.997, for 3."""
    total = (bits & 255) + (bits >> 8 & 255) + (bits >> 16 & 255) + (bits >> 24)
    x = (total - 510).float() * 2**-9
    square = x * x
    return x * (1.676208 + square * (0.083179 + square * 0.475080))


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32 bits, in int64, in which each bit of x moves every other half the time."""
    x = (x ^ x >> 16) * 0x7FEB352D & MASK
    x = (x ^ x >> 15) * 0x846CA68B & MASK
    return x ^ x >> 16


@dataclass(frozen=True)
class PseudoNoise:
    """u of each weight, a function of its index and the seed: nothing of it is kept for backward.

    p: the share of weights that have any. skip: the first of those that have none, and how many.
    """

    kind: str
    seed: int
    p: float = 1.0
    skip: tuple[int, int] = (0, 0)

    @property
    def given(self) -> Draws:
        """As the kernel takes it."""
        keys = self.seed & MASK, self.seed >> 32 & MASK
        return self.kind == "gaussian", *keys, round(self.p * 65536), *self.skip

    def draws(self, n: int, device: torch.device) -> Tensor:
        """u, fp32 [n].

        >>> PseudoNoise("uniform", seed=1, p=0.5).draws(4, torch.device("cpu"))
        tensor([...])
        """
        gaussian, first, second, below, begin, size = self.given
        u = torch.empty(n, device=device)
        for at, part in zip(range(0, n, CHUNK), u.split(CHUNK)):
            index = torch.arange(at, at + len(part), device=device)
            bits = _mixed((_mixed((index + first) & MASK) + second) & MASK)
            part.copy_(_gaussian(bits) if gaussian else _uniform(bits))
            part.mul_(_mixed((bits + first) & MASK) >> 16 < below)
        u[begin : begin + size] = 0
        return u


def noised(rows: Tensor, bits: Tensor, noise: PseudoNoise) -> Tensor:
    """rows [n_groups, g] and the step of each group's bits [n_groups] times u.

    >>> rows, bits = torch.tensor([[0.0, 3.0]]), torch.tensor([2.0], requires_grad=True)
    >>> u = (noised(rows, bits, PseudoNoise("uniform", seed=1)) - rows).detach()  # step 1
    >>> bool((u.abs() <= 0.5).all())
    True
    """
    low, high = range_of(rows)
    tops = torch.exp2(bits.detach()) - 1

    def draws(like: Tensor) -> Tensor:
        return noise.draws(like.numel(), like.device).view(like.shape)

    def value(weight: Tensor) -> Tensor:
        steps = (high - low) / tops
        if kernel.usable(weight):
            return kernel.add(weight, steps, noise.given)
        found: Tensor = weight + (steps.unsqueeze(1) * draws(weight)).to(weight.dtype)
        return found

    def gradients(grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if kernel.usable(grad):
            dots, of_weight = kernel.dots(grad, noise.given)
        else:
            dots, of_weight = (grad * draws(grad)).sum(1), grad.clone(memory_format=torch.contiguous_format)
        slopes = dots / tops  # of high - low, by group
        both = torch.stack([-slopes.sum(), slopes.sum()]).to(grad.dtype)
        of_weight.view(-1).index_add_(0, _ends_at(weight), both)
        return of_weight, slopes * (low - high) / tops * (tops + 1) * log(2)

    return reading.read_by(rows, bits, value, gradients)


def _ends_at(weight: Tensor) -> Tensor:
    """int64 [2]: where the least and the greatest weight lie. argmin of all at once takes longer."""
    parts = weight.reshape(gcd(weight.numel(), 1024), -1)
    found = []
    for extremes, place in ((parts.amin(1), torch.argmin), (parts.amax(1), torch.argmax)):
        row = place(extremes)
        found.append(row * parts.shape[1] + place(parts[row]))
    return torch.stack(found)


def grid(ends: Tensor) -> tuple[Tensor, Tensor]:
    """(step, centre), fp32 [16], of integers of 0 to 15 bits over a range [2]; those of 0 mean nothing.

    >>> step, centre = grid(torch.tensor([-1.0, 2.0]))
    >>> step[2:4].tolist(), centre[2:4].tolist()
    ([1.0, 0.42857...], [0.5, 0.5])
    """
    (low, high), top = ends.float(), tops(ends.device)
    step = (high / top - low / top).clamp_(min=torch.finfo(torch.float32).tiny)
    return step, (low / 2 + high / 2).expand_as(step)


def grid_of_zero(ends: Tensor) -> tuple[Tensor, Tensor]:
    """The same as files had it at first, for a range that holds 0: 0 was a level of each width."""
    step, _ = grid(ends)
    top = tops(ends.device)
    zero = (-ends[0] / (step * OUTWARD)).round_().clamp_(min=0).minimum(top)
    return step, (top / 2 - zero) * step


def tops(device: torch.device) -> Tensor:
    """The highest levels of 0 to 15 bits, fp32; 1 for none."""
    return ((1 << torch.arange(WIDTHS, device=device)) - 1).clamp_(min=1).float()


def dequantize(levels: Tensor, widths: Tensor, step: Tensor, centre: Tensor) -> Tensor:
    """w' fp32, in the memory of levels fp32 [n_groups, g]; widths [n_groups], step and centre [16] by width.

    By the distance to the centre, small where the weight is: steps may be of half precision.
    """
    half, step, centre = (t[widths.int()].unsqueeze(1) for t in (tops(step.device) / 2, step, centre))
    return levels.sub_(half).mul_(step).add_(centre)


def quantize(rows: Tensor, widths: Tensor, step: Tensor, centre: Tensor) -> Tensor:
    """q, fp32 [n_groups, g] of rows [n_groups, g]; step and centre [16] by width."""
    top, step, centre = (t[widths.int()].unsqueeze(1) for t in (tops(step.device), step, centre))
    return (rows.float() - centre).div_(step).add_(top / 2).round_().clamp_(min=0).minimum(top)


def fake_quantize(rows: Tensor, widths: Tensor) -> Tensor:
    """w', of the same shape and dtype; NaN where the tensor holds NaN or Inf.

    >>> fake_quantize(torch.tensor([[-1.0, 0.4], [0.6, 2.0]]), torch.tensor([2, 2])).tolist()
    [[-1.0, 0.0], [1.0, 2.0]]
    """
    step, centre = grid(range_of(rows))
    return dequantize(quantize(rows, widths, step, centre), widths, step, centre).to(rows.dtype)


def stream_bytes(widths: Tensor, size: int) -> int:
    """Bytes of groups of `size` weights at these widths: g * b bits each, and at most 7 more for each width
    that occurs.
    """
    return sum(packed_bytes(n * size, b) for b, n in enumerate(torch.bincount(widths.flatten()).tolist()))


def pack_groups(levels: Tensor, widths: Tensor) -> Tensor:
    """Levels [n_groups, g] -> uint8 [stream_bytes]: the groups of the least width, those of the next, ...

    >>> pack_groups(torch.tensor([[7, 1], [1, 2]]), torch.tensor([3, 2])).tolist()
    [9, 15]
    """
    parts = [pack(levels[widths == b], b) for b in widths.unique().tolist()]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def unpack_groups(packed: Tensor, widths: Tensor, size: int) -> Tensor:
    """What `pack_groups` packed: uint8 [n_groups, size], or int16 where a width is above 8.

    Raises FormatError where the widths, each within 1 .. 15, do not add up to the bytes.

    >>> widths = torch.tensor([3, 2])
    >>> unpack_groups(torch.tensor([9, 15], dtype=torch.uint8), widths, 2).tolist()
    [[7, 1], [1, 2]]
    """
    if len(packed) != (expected := stream_bytes(widths, size)):
        raise FormatError(f"levels: expected {expected} bytes of the widths, found {len(packed)}")
    kind = torch.uint8 if int(widths.max()) <= 8 else torch.int16
    levels, begin = torch.empty(len(widths), size, dtype=kind), 0
    for b in widths.unique().tolist():
        own = widths == b
        n = int(own.sum()) * size
        end = begin + packed_bytes(n, b)
        levels[own] = unpack(packed[begin:end], b, n).to(kind).view(-1, size)
        begin = end
    return levels
