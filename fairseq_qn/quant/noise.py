"""Noise masks: W + m * (phi(W) - W), m ~ Bernoulli(p) per block (Fan et al. 2020, eq. 4-6)."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING

import torch

from fairseq_qn.quant.blocks import to_blocks

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 1 << 20  # draws at a time; part of what defines a mask on a GPU


def seed_of(*parts: int | str) -> int:
    """A 64-bit seed that depends on each of its parts: (seed, update, micro-batch, rank, layer).

    >>> seed_of(1, 200, 0, 0, "fc1")
    6632641766060048050
    """
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def is_certain(p: float) -> bool:
    """Whether p is 1 to the nearest 1/65536: no mask has to be drawn.

    >>> is_certain(1.0), is_certain(0.999999), is_certain(0.9999)
    (True, True, False)
    """
    return round(p * 65536) >= 65536


def bernoulli(n: int, p: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """n independent draws, True with probability p to the nearest 1/65536; bool [n].

    Four draws from each 64-bit number: the generator is what costs.

    >>> bernoulli(8, p=0.5, seed=1).int().tolist()
    [1, 1, 1, 0, 0, 1, 0, 1]
    """
    if is_certain(p):
        return torch.ones(n, dtype=torch.bool, device=device)
    mask = torch.empty(n, dtype=torch.bool, device=device)
    for target, part in zip(mask.split(CHUNK), draws(n, p, seed, device)):
        target.copy_(part)
    return mask


def draws(n: int, p: float, seed: int, device: torch.device | str) -> Iterator[Tensor]:
    """`bernoulli` by CHUNK draws, each in the memory of those before, which the cache holds."""
    generator = torch.Generator(device).manual_seed(seed)
    mask = torch.empty(min(n, CHUNK), dtype=torch.bool, device=device)
    numbers = torch.empty((len(mask) + 3) // 4, dtype=torch.int64, device=device)
    for begin in range(0, n, CHUNK):
        size = min(CHUNK, n - begin)
        numbers[: (size + 3) // 4].random_(-(2**63), None, generator=generator)
        yield torch.lt(numbers.view(torch.int16)[:size], round(p * 65536) - 32768, out=mask[:size])


def drop_blocks(weight: Tensor, mask: Tensor, block_size: int) -> Tensor:
    """The proxy phi = 0: blocks where mask [n_blocks] is True read as zero.

    >>> drop_blocks(torch.ones(2, 4), torch.tensor([True, False, False, True]), block_size=2).tolist()
    [[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]
    """
    blocks = to_blocks(weight, block_size) * mask.logical_not().unsqueeze(1)  # faster than masked_fill
    return blocks.reshape(weight.shape)


def replace_blocks(weight: Tensor, phi: Tensor, mask: Tensor, block_size: int) -> Tensor:
    """Blocks of phi(weight) where mask [n_blocks] is True, of the weight elsewhere.

    Written into `phi`, a contiguous tensor of the weight's dtype: fresh memory costs more than what it is
    filled with.

    >>> phi, mask = torch.full((1, 4), 7.0), torch.tensor([False, True])
    >>> replace_blocks(torch.ones(1, 4), phi, mask, block_size=2).tolist()
    [[1.0, 1.0, 7.0, 7.0]]
    """
    blocks = to_blocks(phi, block_size)
    torch.where(mask.unsqueeze(1), blocks, to_blocks(weight, block_size), out=blocks)
    return phi
