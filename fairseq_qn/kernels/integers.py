"""Integers to weights, and integer noise (integers.c). quant/integer.py defines both, to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fairseq_qn.kernels import native

if TYPE_CHECKING:
    from torch import Tensor


def usable(levels: Tensor, scale: Tensor) -> bool:
    """Whether the kernel takes these."""
    return (
        not native.watched()
        and levels.device.type == "cpu"
        and scale.dtype == torch.float32
        and not scale.requires_grad
        and native.library() is not None
    )


def dequantize(levels: Tensor, scale: Tensor, zero: Tensor, out: Tensor | None = None) -> Tensor:
    """levels uint8 [n_ranges, values a range], scale fp32 and zero uint8 [n_ranges] -> fp32 [n_ranges,
    values a range].

    out: contiguous memory for as many values.
    """
    levels, scale, zero = levels.contiguous(), scale.contiguous(), zero.contiguous()
    weight = torch.empty(levels.shape) if out is None else out.view(levels.shape)
    native.function("qn_dequantize", "PiPPPqqP")(
        *native.threads(), levels.data_ptr(), scale.data_ptr(), zero.data_ptr(), levels.numel(),
        levels.shape[1],
        weight.data_ptr(),
    )  # fmt: skip
    return weight


def noise(weight: Tensor, mask: Tensor, begin: int, steps: Tensor, out: Tensor) -> None:
    """Into out [n_ranges, values a range], from its value `begin` on: min(round(weight / step), highest) *
    scale where mask bool [n] says so, elsewhere the weight, fp32 of out's shape. steps fp32 [3, n_ranges]:
    step, scale, highest. All contiguous.
    """
    step, scale, highest = (t.data_ptr() for t in steps)
    native.function("qn_integer_noise", "PiPPPPPqqqP")(
        *native.threads(), weight.data_ptr() + 4 * begin, mask.data_ptr(), step, scale, highest, begin,
        len(mask), out.shape[1],
        out.data_ptr() + 4 * begin,
    )  # fmt: skip
