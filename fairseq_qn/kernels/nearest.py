"""The compiled steps of k-means (nearest.c). quant/kmeans.py defines them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from fairseq_qn.kernels import native

if TYPE_CHECKING:
    from torch import Tensor

LARGEST = 64  # block sizes that the kernel takes
TILE = 64  # points that lie together
_PIECES = 64  # of the sums at most, whatever the number of threads, so that they are added up in one order


def usable(x: Tensor) -> bool:
    """Whether the kernel takes these rows [n, d]."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[1] <= LARGEST
        and native.library() is not None
    )


@cache
def lanes() -> int:
    """Floats in the widest vectors of this processor that the kernel uses: 4, 8 or 16."""
    found = torch.empty((), dtype=torch.int32)
    native.function("qn_lanes", "P")(found.data_ptr())
    return int(found)


def lay_out(x: Tensor, shift: Tensor, scale: float) -> tuple[Tensor, float]:
    """(x - shift) / scale in the order that `assign` searches in, and the sum of |x - shift|^2.

    x fp32 [n, d], contiguous; shift fp64 [d]; scale a power of two.
    """
    (n, d), step = x.shape, _step(len(x), 1)
    points = torch.empty(-(-n // TILE), d, TILE)
    energies = torch.zeros(-(-n // step), dtype=torch.float64)
    native.function("qn_lay_out", "PiPqiPdqPP")(
        *native.threads(), x.data_ptr(), n, d, shift.data_ptr(), scale, step, points.data_ptr(),
        energies.data_ptr(),
    )  # fmt: skip
    return points, sum(energies.tolist())


def assign(
    points: Tensor, x: Tensor, codebook: Tensor, width: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes int32 [n] of the codeword nearest to each point; fp64 sums [K, d] of the rows of x of each code,
    counts [K].

    points: from lay_out of x, in the units of codebook fp32 [K, d]. width: of vectors, instead of `lanes`.
    """
    codes, codebook = torch.empty(len(x), dtype=torch.int32), codebook.contiguous()
    return codes, *_run(points, x, codebook, codes, len(codebook), width or lanes())


def accumulate(x: Tensor, codes: Tensor, n_centroids: int) -> tuple[Tensor, Tensor]:
    """Sums fp64 [K, d] of the rows of each code, counts int64 [K]; x fp32 [n, d], codes int32 [n]."""
    return _run(None, x.contiguous(), None, codes.contiguous(), n_centroids, 0)


def _run(
    points: Tensor | None, x: Tensor, codebook: Tensor | None, codes: Tensor, k: int, width: int
) -> tuple[Tensor, Tensor]:
    (n, d), step = x.shape, _step(len(x), k)
    pieces = max(1, -(-n // step))
    sums, counts = torch.empty(pieces, k, d, dtype=torch.float64), torch.empty(pieces, k, dtype=torch.int64)
    bias = None if codebook is None else codebook.pow(2).sum(1).div_(-2)
    kernel = native.function("qn_assign", "PiPPqiPPqqiPPP")
    address = [None if t is None else t.data_ptr() for t in (points, x, codebook, bias, codes, sums, counts)]
    kernel(*native.threads(), *address[:2], n, d, *address[2:4], k, step, width, *address[4:])
    return sums[0], counts[0]


def _step(n: int, k: int) -> int:
    """Blocks in a piece of work: whole tiles, and so many that all sums stay smaller than the blocks."""
    return TILE * max(1, -(-n // (TILE * max(1, min(_PIECES, n // k)))))
