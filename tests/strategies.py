"""Hypothesis strategies: hostile weights, their shapes and block sizes."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = (
    "normal",
    "zero",
    "constant",
    "duplicated",
    "one_signed",
    "huge",
    "tiny",
    "mixed",
    "shifted",
    "sparse",
    "grid",
)


def hostile(kind: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight of this kind; the same arguments give the same weight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).clamp(-6, 6)
    other = torch.randn(shape, generator=generator).clamp(-6, 6)
    weight = {
        "normal": lambda: x,
        "zero": lambda: torch.zeros(shape),
        "constant": lambda: torch.full(shape, float(x.flatten()[0]) + 0.1),
        "duplicated": lambda: x[torch.randint(0, max(1, shape[0] // 3), (shape[0],), generator=generator)],
        "one_signed": lambda: x.abs() + 0.5,
        "huge": lambda: x * 1e4 / 6,
        "tiny": lambda: x * 1e-7,
        "mixed": lambda: torch.where(other > 0, x * 1e3, x * 1e-5),
        "shifted": lambda: x * 1e-2 + 1e4,
        "sparse": lambda: torch.where(other > 1, x, 0.0),
        "grid": lambda: (x * 2).round(),
    }[kind]()
    return weight.to(dtype)


@st.composite
def weights(
    draw: st.DrawFn, shape: st.SearchStrategy | None = None, dtypes: tuple = (torch.float32,)
) -> Tensor:
    """A hostile weight, 2-d unless `shape` says otherwise."""
    size = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)) if shape is None else shape)
    return hostile(
        draw(st.sampled_from(KINDS)), size, draw(st.integers(0, 10_000)), draw(st.sampled_from(dtypes))
    )


@st.composite
def shapes_and_block_sizes(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    """A weight shape of Linear, Embedding or Conv2d (1x1, k x k with multiples and divisors) and a block
    size that tiles it.
    """
    rows, d, columns = (
        draw(st.integers(1, 12)),
        draw(st.sampled_from([1, 2, 3, 4, 8, 9])),
        draw(st.integers(1, 6)),
    )
    if draw(st.booleans()):
        return (rows, d * columns) + ((1, 1) if draw(st.booleans()) else ()), d
    kernel = draw(st.sampled_from([(3, 3), (2, 2), (1, 3), (5, 1), (4, 4)]))
    k = kernel[0] * kernel[1]
    channels = draw(st.integers(1, 3))
    divisors = [n for n in range(1, k + 1) if k % n == 0]
    if draw(st.booleans()):
        return (rows, channels * columns, *kernel), channels * k
    return (rows, columns, *kernel), draw(st.sampled_from(divisors))


@st.composite
def weights_and_block_sizes(draw: st.DrawFn, dtypes: tuple = (torch.float32,)) -> tuple[Tensor, int]:
    """A hostile weight of any layer's shape, and a block size that tiles it."""
    shape, block_size = draw(shapes_and_block_sizes())
    return draw(weights(st.just(shape), dtypes)), block_size


def blocks_by_hand(weight: Tensor, block_size: int) -> list[list[tuple[int, ...]]]:
    """Indices of the elements of each block, in order, from the definition of the layout and nothing
    else.
    """
    out, inputs, *kernel = weight.shape
    taps = [(y, x) for y in range(kernel[0]) for x in range(kernel[1])] if kernel else [()]
    blocks = []
    for o in range(out):
        if len(taps) == 1 or block_size % len(taps) == 0:  # whole kernels of neighbouring input channels
            channels = block_size // len(taps)
            for first in range(0, inputs, channels):
                blocks.append([(o, i, *tap) for i in range(first, first + channels) for tap in taps])
        else:  # parts of one kernel
            for i in range(inputs):
                for first in range(0, len(taps), block_size):
                    blocks.append([(o, i, *tap) for tap in taps[first : first + block_size]])
    return blocks
