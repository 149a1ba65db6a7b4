"""Weight <-> blocks [n_blocks, block_size]; the only place that knows the layout.

A block runs along the input dimension, so blocks are consecutive elements of the row-major weight:

    Linear     [out_features, in_features]        in_features / d blocks a row
    Embedding  [num_embeddings, embedding_dim]    embedding_dim / d blocks a row
    Conv       [out, in / groups, *kernel]        d input channels of a 1x1 kernel; of k elements: where
                                                  k divides d, whole kernels of d / k channels; where d
                                                  divides k, parts of one kernel
    Conv1D     of transformers, [in, out]         turned by its view, and then as Linear
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from fairseq_qn.errors import BlockSizeError

if TYPE_CHECKING:
    from torch import Tensor


def check_block_size(shape: Sequence[int], block_size: int, name: str = "weight") -> None:
    """Raise BlockSizeError unless blocks of `block_size` tile a weight of this shape.

    >>> check_block_size((16, 12), 8, name="fc1")
    Traceback (most recent call last):
    fairseq_qn.errors.BlockSizeError: fc1: block_size has to divide the input dimension 12, found 8; try ...
    """
    inputs, kernel = shape[1], prod(shape[2:])
    if kernel == 1:
        if inputs % block_size:
            raise BlockSizeError(
                f"{name}: block_size has to divide the input dimension {inputs}, found {block_size}; "
                f"try one of {_divisors(inputs)}"
            )
    elif block_size % kernel and kernel % block_size:
        raise BlockSizeError(
            f"{name}: block_size has to be a multiple or a divisor of the kernel's {kernel} elements, found "
            f"{block_size}"
        )
    elif block_size % kernel == 0 and inputs % (block_size // kernel):
        raise BlockSizeError(
            f"{name}: block_size {block_size} is {block_size // kernel} kernels of {kernel} elements, "
            f"which has to divide the {inputs} input channels"
        )


def codes_shape(shape: Sequence[int], block_size: int) -> tuple[int, int]:
    """[out_features, blocks a row]: the shape of the codes of a weight of this shape.

    >>> codes_shape((16, 12), 4), codes_shape((32, 6, 3, 3), 9)
    ((16, 3), (32, 6))
    """
    return shape[0], prod(shape[1:]) // block_size


def to_blocks(weight: Tensor, block_size: int) -> Tensor:
    """[out, in, ...] -> [n_blocks, block_size]; a view where the weight is contiguous.

    >>> import torch
    >>> to_blocks(torch.arange(8).view(2, 4), 2).tolist()
    [[0, 1], [2, 3], [4, 5], [6, 7]]
    """
    return weight.reshape(-1, block_size)


def from_blocks(blocks: Tensor, shape: Sequence[int]) -> Tensor:
    """[n_blocks, block_size] -> a weight of this shape."""
    return blocks.reshape(tuple(shape))


def _divisors(n: int) -> list[int]:
    return [d for d in (2, 3, 4, 6, 8, 9, 12, 16, 32) if n % d == 0]
