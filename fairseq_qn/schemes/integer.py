"""Integers of 2 to 8 bits over the range of a tensor, an output channel or a group (Fan et al. 2020, eq. 1).

levels  uint8 [ceil(n * bits / 8)]    packed at `bits` bits
scale   fp32 [n_ranges]
zero    uint8 [n_ranges]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from fairseq_qn.errors import BlockSizeError, FormatError
from fairseq_qn.kernels import native
from fairseq_qn.lines import one_of, whole
from fairseq_qn.quant import integer, noise, reading
from fairseq_qn.quant.bitpack import pack, packed_bytes, unpack
from fairseq_qn.quant.integer import Integers, dequantize, ranges_shape
from fairseq_qn.schemes.base import Draw, Entry, Scheme, Site, Specs, Stored, all_whole

if TYPE_CHECKING:
    from torch import Tensor

BITS, GROUP_SIZES = (2, 8), (1, 65_536)
GRANULARITIES = ("tensor", "channel", "group")
CHUNK = 1 << 20  # weights that are de-quantised at a time: 4 MiB of fp32
MANY = 256  # rows of input from which de-quantising is a small part of the product


@dataclass(frozen=True)
class StoredIntegers(Stored):
    """levels uint8 [n_ranges, values a range], scale and zero [n_ranges]."""

    TENSORS, PREFIX = ("levels", "scale", "zero"), "Int"

    levels: Tensor
    scale: Tensor
    zero: Tensor

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The de-quantised weight."""
        return dequantize(
            Integers(self.levels, self.scale, self.zero), self.shape, dtype or self.scale.dtype
        )

    def rows(self, ids: Tensor) -> Tensor:
        """Only what is asked for is de-quantised."""
        rows, columns = self.shape
        ranges = max(1, len(self.scale) // rows)  # of each row
        affine = (t.view(-1, ranges).expand(rows, -1) for t in (self.scale, self.zero))
        scale, zero = (torch.nn.functional.embedding(ids, t).flatten() for t in affine)
        levels = torch.nn.functional.embedding(ids, self.levels.view(rows, columns)).view(
            -1, columns // ranges
        )
        return dequantize(Integers(levels, scale, zero), (*ids.shape, columns), self.scale.dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """Some rows of the weight at a time, which a core's cache holds. x [..., in_features].

        Not to be recorded: the rows lie in memory that the next kernel overwrites.
        """
        out, columns = self.shape
        step = max(1, CHUNK // columns)
        if x.numel() > MANY * columns:
            return None
        if step >= out:
            return torch.nn.functional.linear(x, self._some(0, out, x.dtype), bias)
        flat = x.reshape(-1, columns)
        y = flat.new_empty(len(flat), out)
        for begin in range(0, out, step):
            end = min(out, begin + step)
            torch.mm(flat, self._some(begin, end, x.dtype).t(), out=y[:, begin:end])
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], out)

    def _some(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """Rows begin .. end of the weight, in memory that the next kernel overwrites."""
        out, columns = self.shape
        levels, ranges = self.levels.view(out, columns)[begin:end], len(self.scale) // out  # 0: one for all
        part = slice(begin * ranges, end * ranges) if ranges else slice(None)
        levels = levels.reshape(-1, self.levels.shape[1] if ranges else levels.numel())
        integers = Integers(levels, self.scale[part], self.zero[part])
        return dequantize(integers, (end - begin, columns), dtype, native.scratch(levels.numel()))


@dataclass(frozen=True)
class Integer(Scheme):
    """`bits` a weight; a scale and a zero for each tensor, channel or group of `group_size` in a row."""

    name, coded_parts = "integer", ("levels",)

    bits: int = 8
    granularity: str = "channel"
    group_size: int = 64

    # -- recipe

    @classmethod
    def parse(cls, fields: Mapping[str, Any], where: str) -> Integer:
        """From `bits`, `granularity` and `group_size`. Raises RecipeError."""
        whole(fields.get("bits", cls.bits), BITS, f"{where}.bits")
        whole(fields.get("group_size", cls.group_size), GROUP_SIZES, f"{where}.group_size")
        one_of(fields.get("granularity", cls.granularity), GRANULARITIES, f"{where}.granularity")
        return cls(**fields)

    def check(self, shape: Sequence[int], name: str) -> None:
        """Raise BlockSizeError unless groups fill a row."""
        ranges_shape(shape, self.granularity, self.group_size, name)

    # -- training

    def quantized(self, w: Tensor, site: Site) -> Tensor:
        """The de-quantised integers."""
        return integer.fake_quantize(w, self.bits, self.granularity, self.group_size, site.name)

    def noised(self, w: Tensor, site: Site, draw: Draw) -> Tensor:
        """Weights drawn read as their integers, whatever the kind of noise: they have a phi of their own."""
        return reading.read(w, partial(self._noised, site=site, draw=draw), None)

    def _noised(self, w: Tensor, site: Site, draw: Draw) -> Tensor:
        if noise.is_certain(draw.p):
            return self.quantized(w, site)
        masks = noise.draws(w.numel(), draw.p, draw.seed, w.device)
        how = (self.bits, self.granularity, self.group_size, site.name)
        return integer.fake_quantize_some(w, masks, *how)

    def fingerprint(self, site: Site) -> dict[str, int]:
        """Bits, which granularity, and the size of its groups."""
        group_size = self.group_size if self.granularity == "group" else 0
        granularity = GRANULARITIES.index(self.granularity)
        return {"bits": self.bits, "granularity": granularity, "group_size": group_size}

    # -- file

    def entry(self, w: Tensor, site: Site, dtype: torch.dtype, learned: bool) -> Entry:
        """Known from the shape alone."""
        return {
            "scheme": self.name, "shape": list(site.shape), "bits": self.bits,
            "granularity": self.granularity, "group_size": self.group_size,
        }  # fmt: skip

    @classmethod
    def check_entry(cls, entry: Entry) -> str | None:
        """Bits and granularity within bounds, groups that fill a row."""
        legal = all_whole(entry, {"bits": BITS, "group_size": GROUP_SIZES})
        if not legal or entry.get("granularity") not in GRANULARITIES:
            return "a field is missing or out of range"
        try:
            ranges_shape(entry["shape"], entry["granularity"], entry["group_size"])
        except BlockSizeError as error:
            return str(error)
        return None

    @classmethod
    def layout(cls, entry: Entry, dtype: str) -> Specs:
        """levels, and an affine map for each range.

        >>> entry = {"shape": [64, 32], "bits": 4, "granularity": "channel", "group_size": 64}
        >>> {part: shape for part, (_, shape) in Integer.layout(entry, "float16").items()}
        {'levels': (1024,), 'scale': (64,), 'zero': (64,)}
        """
        ranges, _ = ranges_shape(entry["shape"], entry["granularity"], entry["group_size"])
        levels = "uint8", (packed_bytes(prod(entry["shape"]), entry["bits"]),)
        return {"levels": levels, "scale": ("float32", (ranges,)), "zero": ("uint8", (ranges,))}

    def encode(self, w: Tensor, site: Site, dtype: torch.dtype) -> tuple[Entry, dict[str, Tensor]]:
        """Packed levels, and the ranges as they are."""
        found = integer.quantize(w, self.bits, self.granularity, self.group_size, site.name)
        parts = {"levels": pack(found.levels, self.bits), "scale": found.scale, "zero": found.zero}
        return self.entry(w, site, dtype, learned=True), parts

    @classmethod
    def decode(cls, entry: Entry, parts: Mapping[str, Tensor]) -> StoredIntegers:
        """Levels, one in a byte, by range."""
        bits, scale, zero = entry["bits"], parts["scale"], parts["zero"]
        ends = torch.stack([-zero.float(), 2.0**bits - 1 - zero.float()]) * scale
        if not bool(torch.isfinite(ends).all()):
            raise FormatError("expected finite weights, found NaN or Inf; save another checkpoint")
        rows, columns = ranges_shape(entry["shape"], entry["granularity"], entry["group_size"])
        levels = unpack(parts["levels"], bits, rows * columns).reshape(rows, columns)
        return StoredIntegers(tuple(entry["shape"]), levels, scale, zero)

    @classmethod
    def label(cls, entry: Entry) -> str:
        """int4."""
        return f"int{entry['bits']}"
