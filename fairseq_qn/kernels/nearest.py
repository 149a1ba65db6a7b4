"""The compiled search for the nearest codeword (nearest.c), where installation could compile it. Defined by quant/kmeans.py."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fairseq_qn.kernels import native
from fairseq_qn.kernels.native import INT, POINTER, SIZE

LARGEST = 64  # block sizes that the kernel takes
_ROWS = 32  # rows that the kernel works on at a time
_PARTS = 64  # parts of the sums, whatever the number of threads, so that they are added up in one order


def usable(x: Tensor) -> bool:
    """Whether the kernel takes these rows [n, d]."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.shape[1] <= LARGEST and native.library() is not None


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Index int32 [n] of the codeword of codebook [K, d] that is nearest to each row of x [n, d]; both fp32 on the CPU."""
    (n, d), x, codebook = x.shape, x.contiguous(), codebook.contiguous()
    bias = codebook.pow(2).sum(1).div_(-2)
    codes = torch.empty(n, dtype=torch.int32)

    kernel = native.function("qn_nearest", (POINTER, SIZE, POINTER, POINTER, SIZE, INT, POINTER))

    def search(begin: int, end: int) -> None:
        kernel(
            x.data_ptr() + 4 * d * begin, end - begin, codebook.data_ptr(), bias.data_ptr(), len(codebook), d,
            codes.data_ptr() + 4 * begin,
        )  # fmt: skip

    _share_out(search, n, torch.get_num_threads() * 4)
    return codes


def accumulate(x: Tensor, codes: Tensor, n_centroids: int) -> tuple[Tensor, Tensor]:
    """Sums fp64 [K, d] of the rows of each code, and their counts int64 [K]; x fp32 [n, d], codes int32 [n]."""
    (n, d), x, codes = x.shape, x.contiguous(), codes.contiguous()
    parts = max(1, min(_PARTS, n // (4 * n_centroids)))
    sums = torch.zeros(parts, n_centroids, d, dtype=torch.float64)
    counts = torch.zeros(parts, n_centroids, dtype=torch.int64)
    step = -(-n // parts)

    kernel = native.function("qn_accumulate", (POINTER, POINTER, SIZE, INT, POINTER, POINTER))

    def add(begin: int, end: int) -> None:
        part = begin // step
        kernel(
            x.data_ptr() + 4 * d * begin, codes.data_ptr() + 4 * begin, end - begin, d,
            sums[part].data_ptr(), counts[part].data_ptr(),
        )  # fmt: skip

    _share_out(add, n, parts, step)
    return sums.sum(0), counts.sum(0)


def _share_out(work: Callable[[int, int], None], n: int, parts: int, step: int | None = None) -> None:
    """work(begin, end) over all rows, in pieces, on as many threads as torch uses."""
    step = step or _ROWS * -(-n // (_ROWS * parts))
    pieces = [(begin, min(n, begin + step)) for begin in range(0, n, step)]
    threads = min(torch.get_num_threads(), len(pieces))
    if threads <= 1:
        for piece in pieces:
            work(*piece)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda piece: work(*piece), pieces))
