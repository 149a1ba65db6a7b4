"""Weights from integers (dequantize.c), where installation could compile it. Defined by quant/integer.py, to the bit."""

from __future__ import annotations

import torch
from torch import Tensor

from fairseq_qn.kernels import native
from fairseq_qn.kernels.native import POINTER, SIZE

_ARGUMENTS = (*native.THREADS, POINTER, POINTER, POINTER, SIZE, SIZE, POINTER)


def usable(levels: Tensor, scale: Tensor) -> bool:
    """Whether the kernel takes these."""
    return levels.device.type == "cpu" and scale.dtype == torch.float32 and native.library() is not None


def dequantize(levels: Tensor, scale: Tensor, zero: Tensor, out: Tensor | None = None) -> Tensor:
    """levels uint8 [n_ranges, values a range], scale fp32 and zero uint8 [n_ranges] -> fp32 [n_ranges, values a range].

    out: contiguous memory for as many values.
    """
    levels, scale, zero = levels.contiguous(), scale.contiguous(), zero.contiguous()
    weight = torch.empty(levels.shape) if out is None else out.view(levels.shape)
    native.function("qn_dequantize", _ARGUMENTS)(
        *native.threads(), levels.data_ptr(), scale.data_ptr(), zero.data_ptr(), levels.numel(), levels.shape[1],
        weight.data_ptr(),
    )  # fmt: skip
    return weight
