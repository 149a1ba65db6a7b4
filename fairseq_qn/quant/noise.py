"""Noise masks and the noised weight: W + m * (phi(W) - W), m ~ Bernoulli(p) per block (Fan et al. 2020, eq. 4-6)."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

from fairseq_qn.quant.blocks import to_blocks


def seed_of(*parts: int | str) -> int:
    """A 64-bit seed that depends on each of its parts: (seed, update, micro-batch, rank, layer)."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def bernoulli(n: int, p: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """n independent draws, True with probability p to the nearest 1/65536; bool [n].

    Four draws from each 64-bit number: the generator is what costs.
    """
    generator = torch.Generator(device).manual_seed(seed)
    bits = torch.empty((n + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)
    threshold = round(p * 65536) - 32768
    if threshold > 32767:
        return torch.ones(n, dtype=torch.bool, device=device)
    return bits.view(torch.int16)[:n] < threshold


def drop_blocks(weight: Tensor, mask: Tensor, block_size: int) -> Tensor:
    """The proxy phi = 0: blocks where mask [n_blocks] is True read as zero."""
    return to_blocks(weight, block_size).masked_fill(mask.unsqueeze(1), 0).reshape(weight.shape)


def replace_blocks(weight: Tensor, phi: Tensor, mask: Tensor, block_size: int) -> Tensor:
    """Blocks of phi(weight) where mask [n_blocks] is True, of the weight elsewhere. block_size 1: element by element."""
    blocks = torch.where(mask.unsqueeze(1), to_blocks(phi, block_size), to_blocks(weight, block_size))
    return blocks.reshape(weight.shape)
