"""Widths that are learned with the weights: pseudo-noise stands for rounding (DiffQ, Defossez et al. 2021).

Each group of g weights has a logit l and so B = min + sigmoid(l) (max - min) bits; the range [low, high] is
the tensor's.
    training   w + step u, step = (high - low) / (2^B - 1), differentiable in l; u uniform in [-1/2, 1/2] or
               normal of deviation 1/2
    else       b = round(B); q = clamp(round(w / step) + zero, 0, 2^b - 1), w' = (q - zero) step
    size       sum of g B bits; rounded, of g b
Other than in the paper, the range is widened to hold 0 and zero = round(-low / step), so that 0 is exact at
every width, as of all integers here.
"""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING

import torch

from fairseq_qn.errors import FormatError
from fairseq_qn.quant.bitpack import pack, packed_bytes, unpack
from fairseq_qn.quant.integer import OUTWARD

if TYPE_CHECKING:
    from torch import Tensor

FIRST = 8  # bits before anything is learned, as published, where the bounds allow it
NOISES = ("gaussian", "uniform")


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


def range_of(weight: Tensor) -> Tensor:
    """fp32 [2]: the least and the greatest weight, and at least 0."""
    flat = weight.detach().float()
    return torch.stack([flat.amin().clamp(max=0), flat.amax().clamp(min=0)])


def pseudo_noise(n: int, kind: str, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """n draws of u, fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    if kind == "uniform":
        return torch.rand(n, generator=generator, device=device).sub_(0.5)
    return torch.randn(n, generator=generator, device=device).mul_(0.5)


def noised(rows: Tensor, bits: Tensor, noise: Tensor) -> Tensor:
    """rows [n_groups, g] and the step of each group's bits [n_groups] times noise [n_groups, g].

    >>> rows, bits = torch.tensor([[0.0, 3.0]]), torch.tensor([2.0], requires_grad=True)
    >>> seen = noised(rows, bits, torch.tensor([[0.5, -0.5]]))  # step 1
    >>> seen.tolist()
    [[0.5, 2.5]]
    """
    low, high = range_of(rows)
    steps = (high - low) / (torch.exp2(bits) - 1)
    seen: Tensor = rows + (steps.unsqueeze(1) * noise).to(rows.dtype)
    return seen


def affine(ends: Tensor, widths: Tensor) -> tuple[Tensor, Tensor]:
    """(step, zero), fp32, of integers of these widths over a range [2].

    >>> step, zero = affine(torch.tensor([-1.0, 2.0]), torch.tensor([2, 3]))
    >>> step.tolist(), zero.tolist()
    ([1.0, 0.42857...], [1.0, 2.0])
    """
    low, high = ends.float()
    top = ((1 << widths.int()) - 1).float()
    step = (high / top - low / top).clamp_(min=torch.finfo(torch.float32).tiny)
    return step, (-low / (step * OUTWARD)).round_().minimum(top)


def quantize(rows: Tensor, widths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(q - zero fp32 [n_groups, g], step and zero [n_groups, 1]) of rows [n_groups, g]."""
    step, zero = (t.unsqueeze(1) for t in affine(range_of(rows), widths))
    top = ((1 << widths.int()) - 1).float().unsqueeze(1)
    levels = (rows.float() / (step * OUTWARD)).round_().clamp_(-zero, top - zero)
    return levels, step, zero


def fake_quantize(rows: Tensor, widths: Tensor) -> Tensor:
    """w', of the same shape and dtype; NaN where the tensor holds NaN or Inf.

    >>> fake_quantize(torch.tensor([[-1.0, 0.4], [0.6, 2.0]]), torch.tensor([2, 2])).tolist()
    [[-1.0, 0.0], [1.0, 2.0]]
    """
    levels, step, _ = quantize(rows, widths)
    return levels.mul_(step).to(rows.dtype)


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
