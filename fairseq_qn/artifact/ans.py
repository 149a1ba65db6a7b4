"""Entropy coding of packed codes: asymmetric numeral systems (Duda 2013) over the counts of each part, by
the library constriction.

    stream   uint16 [2^bits]   how often each code occurs, in parts of 65,535, at least 1 where it occurs
             uint32 [...]      what the library's AnsCoder makes of the codes; both little-endian
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch

from fairseq_qn.errors import FormatError, UnsupportedError
from fairseq_qn.quant.bitpack import pack, unpack

if TYPE_CHECKING:
    from torch import Tensor

MAX_BITS = 8  # a table of 512 bytes; the counts of longer codes would cost more than they save
WHOLE = 65_535


class Ans:
    """The first version of the stream above."""

    def encode(self, raw: Tensor, bits: int) -> Tensor:
        """Codes of `bits` bits, packed -> uint8 [m]; as they are where they are longer than 8 bits.

        Raises UnsupportedError without the library.
        """
        if bits > MAX_BITS or not len(raw):
            return raw
        library = _library(UnsupportedError)
        codes = unpack(raw, bits, len(raw) * 8 // bits).numpy()
        counts = np.bincount(codes, minlength=1 << bits)
        shares = np.maximum(np.rint(counts * (WHOLE / len(codes))), counts > 0).astype("<u2")
        coder = library.stream.stack.AnsCoder()
        coder.encode_reverse(codes.astype(np.int32), _model(library, shares))
        words = np.asarray(coder.get_compressed()).astype("<u4")
        return _tensor(shares.tobytes() + words.tobytes())

    def decode(self, coded: Tensor, size: int, bits: int) -> Tensor:
        """uint8 [m] -> the packed codes, uint8 [size]. Raises FormatError, also without the library."""
        library = _library(FormatError)
        data, table, n = coded.numpy().tobytes(), 2 << bits, size * 8 // bits
        if bits > MAX_BITS or len(data) < table or (len(data) - table) % 4:
            raise FormatError(f"ans: expected a table and whole words, found {len(data)} bytes")
        try:
            model = _model(library, np.frombuffer(data[:table], "<u2"))
            coder = library.stream.stack.AnsCoder(np.frombuffer(data[table:], "<u4").astype(np.uint32))
            codes = coder.decode(model, n)
        except (ValueError, AssertionError) as error:
            raise FormatError(f"ans: cannot be decoded, {error}; the file is damaged") from None
        if not coder.is_empty():
            raise FormatError(f"ans: more than {n} codes; the file is damaged")
        return pack(torch.from_numpy(codes.astype(np.uint8)), bits)


def _model(library: ModuleType, shares: np.ndarray) -> object:
    """The library's model of codes that occur in these shares. It normalises, in 24 bits, by itself."""
    return library.stream.model.Categorical(shares.astype(np.float64) / WHOLE, perfect=False)


def _library(error: type[Exception]) -> ModuleType:
    try:
        return import_module("constriction")
    except ImportError:
        raise error("ans: needs the library constriction; pip install constriction") from None


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
