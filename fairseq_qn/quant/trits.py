"""Ternary digits, five to a byte: 3^5 = 243 of 256 values, 1.6 bits a digit where log2(3) is 1.58.

Digit i has weight 3^(i % 5) in byte i // 5; the last byte is filled up with zeros.

    >>> packed = pack_trits(torch.tensor([2, 0, 1, 0, 0, 1]))
    >>> packed.tolist(), unpack_trits(packed, 6).tolist()
    ([11, 1], [2, 0, 1, 0, 0, 1])
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fairseq_qn.errors import EncodeError, FormatError

if TYPE_CHECKING:
    from torch import Tensor

POWERS = (1, 3, 9, 27, 81)


def trit_bytes(n: int) -> int:
    """Bytes that `n` digits take.

    >>> trit_bytes(5), trit_bytes(6)
    (1, 2)
    """
    return (n + 4) // 5


def pack_trits(values: Tensor) -> Tensor:
    """Integers 0 .. 2 of any shape -> uint8 [trit_bytes(n)]. Raises EncodeError for others."""
    flat = values.detach().cpu().reshape(-1)
    if flat.numel() and not 0 <= int(flat.min()) <= int(flat.max()) <= 2:
        raise EncodeError(f"pack: expected digits 0 to 2, found {int(flat.min())} to {int(flat.max())}")
    digits = torch.zeros(5 * trit_bytes(len(flat)), dtype=torch.uint8)
    digits[: len(flat)] = flat
    columns = digits.view(-1, 5).unbind(1)
    packed = columns[0].clone()
    for column, power in zip(columns[1:], POWERS[1:], strict=True):
        packed += column * power
    return packed


def unpack_trits(packed: Tensor, n: int) -> Tensor:
    """The `n` digits that `pack_trits` wrote, uint8 [n].

    Raises FormatError unless `packed` is uint8 [trit_bytes(n)], of bytes below 243, filled up with zeros.
    """
    if packed.dtype != torch.uint8 or packed.shape != (trit_bytes(n),):
        found = f"{packed.dtype} {list(packed.shape)}"
        raise FormatError(
            f"ternary digits: expected uint8 [{trit_bytes(n)}], found {found}; the file is damaged"
        )
    octets = packed.detach().cpu()
    if octets.numel() and int(octets.max()) >= 243:
        raise FormatError(
            f"ternary digits: expected bytes below 243, found {int(octets.max())}; the file is damaged"
        )
    table = torch.stack([torch.arange(243) // power % 3 for power in POWERS], 1).to(torch.uint8)
    digits = table[octets.int()].reshape(-1)
    if bool(digits[n:].any()):
        raise FormatError(f"ternary digits: expected zeros after {n} of them; the file is damaged")
    return digits[:n]
