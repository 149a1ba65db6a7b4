"""Pseudo-noise of groups of weights and its gradient (pseudo_noise.c), defined by quant/learned_bits.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fairseq_qn.kernels import native

if TYPE_CHECKING:
    from torch import Tensor

Draws = tuple[bool, int, int, int, int, int]  # gaussian, two keys, below, skip from, how many


def usable(values: Tensor) -> bool:
    """Whether the kernel takes these."""
    known = values.device.type == "cpu" and values.dtype == torch.float32
    return known and not native.watched() and _kernel() is not None


def add(values: Tensor, steps: Tensor, draws: Draws) -> Tensor:
    """values fp32 [n_groups, g] and steps fp32 [n_groups] times u."""
    return _call(values, steps.contiguous(), None, draws)


def dots(values: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """(sums fp32 [n_groups] of values fp32 [n_groups, g] times u, a copy of the values)."""
    sums = values.new_empty(len(values))
    return sums, _call(values, None, sums, draws)


def _call(values: Tensor, steps: Tensor | None, sums: Tensor | None, draws: Draws) -> Tensor:
    values = values.contiguous()
    out = torch.empty_like(values)
    pointers = (None if t is None else t.data_ptr() for t in (values, steps, sums, out))
    _kernel()(*native.threads(), *draws, *values.shape, *pointers)
    return out


def _kernel() -> Any:
    """None without the library, or where it was built before this kernel was there."""
    return native.library() and native.function("qn_pseudo_noise", "PiiqqqqqqqPPPP")
