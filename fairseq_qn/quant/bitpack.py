"""Codes of 1 to 16 bits, packed with no gaps into bytes.

Little-endian bit order: code i takes bits [i * bits, (i + 1) * bits) of the stream, its lowest bit first,
and bit j of the stream is bit j % 8 of byte j // 8. The last byte is filled up with zero bits. Three codes
of 3 bits, written with the highest bit on the left:

    code            7 = 111    1 = 001    6 = 110
    byte 0          10 001 111                        the low two bits of 6, then 1, then 7
    byte 1          0000000 1                         seven zeros of padding, the high bit of 6

    >>> import torch
    >>> packed = pack(torch.tensor([7, 1, 6]), bits=3)
    >>> [f"{byte:08b}" for byte in packed.tolist()]
    ['10001111', '00000001']
    >>> unpack(packed, bits=3, n=3).tolist()
    [7, 1, 6]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from fairseq_qn.errors import EncodeError, FormatError

if TYPE_CHECKING:
    from torch import Tensor

MAX_BITS = 16

# Codes at a time: a multiple of 8, so that each chunk starts on a byte, and few enough that temporaries (at
# most 18 bytes a code) stay in a cache.
_CHUNK = 1 << 17


def packed_bytes(n: int, bits: int) -> int:
    """Bytes that `n` codes of `bits` bits take: ceil(n * bits / 8).

    >>> packed_bytes(3, 3)
    2
    """
    return (n * bits + 7) // 8


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack integers, of any shape and integer dtype, into uint8 [packed_bytes(values.numel(), bits)].

    With 8 or 16 bits the result may share memory with `values`.

    Raises: EncodeError if `bits` is not in 1..16, `values` are not integers, or one of them is outside [0,
    2**bits).
    """
    if not _is_width(bits):
        raise EncodeError(
            f"pack: expected bits in 1..{MAX_BITS}, found {bits!r}; choose at most 2**{MAX_BITS} codes"
        )
    if values.dtype.is_floating_point or values.dtype.is_complex:
        raise EncodeError(f"pack: expected integer codes, found {values.dtype}; convert them first")
    flat = values.detach().cpu().contiguous().reshape(-1).numpy()
    if flat.size and (flat.min() < 0 or flat.max() >= 1 << bits):
        raise EncodeError(
            f"pack: expected codes in [0, {1 << bits}) for {bits} bits, "
            f"found {flat.min()} to {flat.max()}; use more bits"
        )
    if bits in (8, 16):
        return torch.from_numpy(flat.astype(_unsigned(bits), copy=False).view(np.uint8))
    packed = np.empty(packed_bytes(flat.size, bits), np.uint8)
    for start in range(0, flat.size, _CHUNK):
        chunk = flat[start : start + _CHUNK].astype(_unsigned(bits))
        octets = chunk.view(np.uint8).reshape(chunk.size, -1)  # [n, 1 or 2], low byte first
        stream = np.unpackbits(octets, axis=1, count=bits, bitorder="little")  # [n, bits], lowest bit first
        first = packed_bytes(start, bits)
        packed[first : first + packed_bytes(chunk.size, bits)] = np.packbits(
            stream.reshape(-1), bitorder="little"
        )
    return torch.from_numpy(packed)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """The `n` codes that `pack` wrote, [n]: uint8 for at most 8 bits, int32 above.

    With 8 bits the result may share memory with `packed`. Nothing is allocated before the length has been
    checked.

    Raises: FormatError if `packed` is not uint8 [packed_bytes(n, bits)], or its padding bits are not zero.
    """
    if not _is_width(bits) or type(n) is not int or n < 0:
        raise FormatError(
            f"packed codes: expected bits in 1..{MAX_BITS} and a count of 0 or more, "
            f"found {bits!r} and {n!r}; the file is damaged"
        )
    if packed.dtype != torch.uint8 or packed.shape != (packed_bytes(n, bits),):
        raise FormatError(
            f"packed codes: expected uint8 [{packed_bytes(n, bits)}] for {n} codes of {bits} bits, "
            f"found {packed.dtype} {list(packed.shape)}; the file is damaged"
        )
    octets = packed.detach().cpu().contiguous().numpy()
    used = n * bits % 8  # bits of the last byte that carry codes; 0 stands for all
    if used and octets[-1] >> used:
        raise FormatError(
            f"packed codes: expected zero bits after {n} codes of {bits} bits, "
            f"found {octets[-1]:#04x} as last byte; the file is damaged"
        )
    if bits == 8:
        return torch.from_numpy(octets)
    if bits == 16:
        return torch.from_numpy(octets.view(_unsigned(bits)).astype(np.int32))
    codes = np.empty(n, np.uint8 if bits < 8 else np.int32)
    for start in range(0, n, _CHUNK):
        part, first = codes[start : start + _CHUNK], packed_bytes(start, bits)
        part[:] = _unpacked(octets[first : first + packed_bytes(part.size, bits)], bits)[: part.size]
    return torch.from_numpy(codes)


def _unpacked(octets: np.ndarray, bits: int) -> np.ndarray:
    """The codes in these bytes, and zeros up to a multiple of 8: eight codes take `bits` bytes."""
    groups = -(-octets.size // bits)
    rows = np.zeros((groups, bits), np.uint8)
    rows.reshape(-1)[: octets.size] = octets
    columns = rows.T.astype(np.uint8 if bits <= 8 else np.int32, order="C")
    codes = np.empty((groups, 8), columns.dtype)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = columns[byte] >> shift
        for k in range(1, packed_bytes(1, shift + bits)):  # the other bytes that it reaches into
            code |= columns[byte + k] << (8 * k - shift)
        codes[:, i] = code & ((1 << bits) - 1)
    return codes.reshape(-1)


def _is_width(bits: int) -> bool:
    return type(bits) is int and 1 <= bits <= MAX_BITS


def _unsigned(bits: int) -> np.dtype:
    """The narrowest little-endian unsigned type that holds `bits` bits."""
    return np.dtype("u1" if bits <= 8 else "<u2")
