"""F.linear(x, decode(codes, codebook)) of codes that stay codes (lookup.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fairseq_qn.kernels import native

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 64  # block sizes that the kernel takes
_CHUNK = 4096  # outputs of a piece of work: their sums, 256 KiB for 16 rows, stay in a core's L2


def usable(codes: Tensor, codebook: Tensor) -> bool:
    """Whether the kernel takes these, converted to fp32."""
    return (
        not native.watched()
        and codes.dtype == torch.uint8
        and codes.device.type == "cpu"
        and codebook.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and codebook.shape[1] <= LARGEST
        and not codebook.requires_grad
        and native.library() is not None
    )


def linear(x: Tensor, codes: Tensor, codebook: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in_features], codes uint8 [out_features, in_features / d] below K, codebook [K, d], bias
    [out_features], all but the codes fp32 -> [..., out_features].
    """
    (out, groups), (k, d) = codes.shape, codebook.shape
    rows = x.numel() // (groups * d)
    x, codes, codebook = x.contiguous(), codes.contiguous(), codebook.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(*x.shape[:-1], out)
    lanes = 4 if rows <= 4 else 8 if rows <= 8 else 16
    threads = native.threads()
    chunk = _chunk(out, -(-rows // lanes), threads[1])
    size = native.function("qn_lookup_scratch", "qiqi", "q")(k, d, chunk, lanes)
    scratch = native.scratch(threads[1] * size)
    native.function("qn_lookup", "PiPqPPqiPPqqqiP")(
        *threads, x.data_ptr(), rows, codes.data_ptr(), codebook.data_ptr(), k, d,
        None if bias is None else bias.data_ptr(),
        y.data_ptr(), groups, out, chunk, lanes, scratch.data_ptr(),
    )  # fmt: skip
    return y


def _chunk(out: int, tiles: int, threads: int) -> int:
    """Outputs of a piece, a multiple of 16: all, unless threads stand idle or the sums outgrow the cache."""
    parts = threads if tiles % threads and tiles < 4 * threads else 1
    return min(_CHUNK, 16 * -(-out // (16 * parts)))
