"""Integers of 1 to 8 bits over the range of a tensor, an output channel or a group (Fan et al. 2020, eq. 1).

levels  uint8 [ceil(n * bits / 8)]    packed at `bits` bits; ternary: five to a byte
scale   fp32 [n_ranges]
zero    uint8 [n_ranges]              not where they are symmetric: it is known
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from fairseq_qn.errors import BlockSizeError, FormatError, RecipeError
from fairseq_qn.kernels import native
from fairseq_qn.lines import flag, one_of, whole
from fairseq_qn.quant import integer, lsq, noise, ranges, reading
from fairseq_qn.quant.bitpack import pack, packed_bytes, unpack
from fairseq_qn.quant.integer import Integers, Ranges, dequantize, ranges_shape
from fairseq_qn.quant.ranges import METHODS, TERNARY, zero_and_top
from fairseq_qn.quant.trits import pack_trits, trit_bytes, unpack_trits
from fairseq_qn.schemes.base import Draw, Entry, Scheme, Site, Specs, Stored, all_whole, distortion

if TYPE_CHECKING:
    from torch import Tensor

BITS, GROUP_SIZES = (1, 8), (1, 65_536)
GRANULARITIES = ("tensor", "channel", "group")
LEARNED = "learned"
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

    def signed(self) -> tuple[Tensor, Tensor] | None:
        """Where they are symmetric, over the tensor or its channels."""
        levels = self.levels.int() - self.zero.int().unsqueeze(1)
        if len(self.scale) not in (1, self.shape[0]) or bool((levels.abs() > 127).any()):
            return None
        return levels.to(torch.int8).view(self.shape), self.scale

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
    """`bits` a weight; a scale, and a zero unless `symmetric`, for each tensor, channel or group of
    `group_size` in a row.

    ranges: how they are found (quant/ranges.py), or `learned` (quant/lsq.py). Those of min-max, and the
    scale of one bit, are those of the present weights. Others are found when noise begins, when its
    `refresh` is due and when a layer is frozen, and kept in the buffer `ranges`; learned steps go on from
    the first ones, by the Parameter `step_change`.
    """

    name, coded_parts = "integer", ("levels",)
    buffer_names, parameter_names = ("ranges",), ("step_change",)

    bits: int | str = 8
    granularity: str = "channel"
    group_size: int = 64
    symmetric: bool = False
    ranges: str = "minmax"

    # -- recipe

    @classmethod
    def parse(cls, fields: Mapping[str, Any], where: str) -> Integer:
        """From `bits`, `granularity`, `group_size`, `symmetric` and `ranges`. Raises RecipeError."""
        bits, least = fields.get("bits", cls.bits), "least_squares"
        if bits != TERNARY:
            whole(bits, BITS, f"{where}.bits", f" or {TERNARY}")
        few = bits in (1, TERNARY)
        whole(fields.get("group_size", cls.group_size), GROUP_SIZES, f"{where}.group_size")
        one_of(fields.get("granularity", cls.granularity), GRANULARITIES, f"{where}.granularity")
        known = (least, LEARNED) if few else (*METHODS, LEARNED)
        found = one_of(fields.get("ranges", known[0]), known, f"{where}.ranges")
        symmetric = flag(fields.get("symmetric", few or found == LEARNED), f"{where}.symmetric")
        if not symmetric and (few or found == LEARNED):
            why = f"{bits} bits" if few else "learned steps"
            raise RecipeError(f"{where}.symmetric: expected true of {why}, found false; take it out")
        return cls(**{**fields, "symmetric": symmetric, "ranges": found})

    def check(self, shape: Sequence[int], name: str) -> None:
        """Raise BlockSizeError unless groups fill a row."""
        self._shape(shape, name)

    # -- training

    @property
    def _keeps(self) -> bool:
        """Whether ranges are kept from one read to the next."""
        return self.ranges == LEARNED or (self.ranges != "minmax" and self.bits != 1)

    def buffers(self, shape: Sequence[int], padding_idx: int | None) -> dict[str, Tensor]:
        """ranges int32 [1 or 2, n_ranges]: the bits of their fp32 scales, and zeros unless symmetric."""
        if not self._keeps:
            return {}
        n = self._shape(shape)[0]
        return {"ranges": torch.zeros((1 if self.symmetric else 2, n), dtype=torch.int32)}

    def parameters(self, shape: Sequence[int]) -> dict[str, Tensor]:
        """step_change [n_ranges]: by how much each step differs from its first value."""
        return {"step_change": torch.zeros(self._shape(shape)[0])} if self.ranges == LEARNED else {}

    def quantized(self, w: Tensor, site: Site) -> Tensor:
        """The de-quantised integers."""
        return integer.fake_quantize(w, *self._how(site), self._present(w, site))

    def noised(self, w: Tensor, site: Site, draw: Draw) -> Tensor:
        """Weights drawn read as their integers, whatever the kind of noise: they have a phi of their own."""
        if self.ranges == LEARNED:
            return self._learned(w, site, draw)
        return reading.read(w, partial(self._noised, site=site, draw=draw), None)

    def frozen(self, w: Tensor, site: Site) -> Tensor:
        """All weights as their integers."""
        return self._learned(w, site, None) if self.ranges == LEARNED else super().frozen(w, site)

    def _noised(self, w: Tensor, site: Site, draw: Draw | None, mask: Tensor | None = None) -> Tensor:
        if draw is None or noise.is_certain(draw.p):
            return self.quantized(w, site)
        masks = noise.draws(w.numel(), draw.p, draw.seed, w.device) if mask is None else [mask]
        return integer.fake_quantize_some(w, masks, *self._how(site), self._present(w, site))

    def _learned(self, w: Tensor, site: Site, draw: Draw | None) -> Tensor:
        certain = draw is None or noise.is_certain(draw.p)
        mask = None if certain or draw is None else noise.bernoulli(w.numel(), draw.p, draw.seed, w.device)
        found = self._steps(site)

        def gradients(grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            rows = self._rows(weight)
            drawn = None if mask is None else mask.view(rows.shape)
            of_weight, of_step = lsq.gradients(self._rows(grad), rows, found, drawn)
            return of_weight.view(grad.shape).to(grad.dtype), of_step

        value = partial(self._noised, site=site, draw=draw, mask=mask)
        return reading.read_by(w, site.parameter("step_change"), value, gradients)

    def needs_learning(self, kind: str) -> bool:
        """Ranges that are kept have to be found."""
        return self._keeps and kind != "none"

    def learn(self, w: Tensor, site: Site, warm: bool, iterations: int, seed: int) -> float:
        """Find the ranges that are kept; steps that training has moved stay."""
        trained = warm and self.ranges == LEARNED and bool(site.parameter("step_change").any())
        if not self._keeps or trained:
            return super().learn(w, site, warm, iterations, seed)
        found = self._find(w)
        kept = [found.scale.squeeze(1).view(torch.int32), found.zero.squeeze(1).int()]
        site.buffer("ranges").copy_(torch.stack(kept[: 1 if self.symmetric else 2]))
        return distortion(w, integer.fake_quantize(w, *self._how(site), found))

    def misfit(self, found: Mapping[str, Tensor], site: Site) -> str | None:
        """Scales that are no positive numbers, zeros that are no levels."""
        if not self._keeps:
            return None
        kept, shape = found["ranges"], self.buffers(site.shape, None)["ranges"].shape
        if kept.shape != shape or kept.dtype != torch.int32:
            return f"expected ranges int32 {list(shape)}, found {kept.dtype} {list(kept.shape)}"
        scale, top = kept[0].contiguous().view(torch.float32), zero_and_top(self.bits, self.symmetric)[1]
        sound = bool((torch.isfinite(scale) & (scale > 0)).all())
        return (
            None
            if sound and bool(((kept[1:] >= 0) & (kept[1:] <= top)).all())
            else (f"expected ranges of positive scales, and zeros of 0 to {top}")
        )

    def fingerprint(self, site: Site) -> dict[str, int]:
        """Bits, 0 for ternary; which granularity, + 10 if symmetric, + 100 times which ranges; the size of
        its groups.
        """
        group_size = self.group_size if self.granularity == "group" else 0
        granularity = GRANULARITIES.index(self.granularity) + 10 * self.symmetric
        granularity += 100 * (*METHODS, LEARNED).index(self.ranges)
        bits = 0 if self.bits == TERNARY else int(self.bits)
        return {"bits": bits, "granularity": granularity, "group_size": group_size}

    def finite(self, w: Tensor, site: Site) -> bool:
        """Ranges that are kept would clamp infinity."""
        return bool(torch.isfinite(w).all()) and super().finite(w, site)

    # -- file

    def entry(self, w: Tensor, site: Site, dtype: torch.dtype, learned: bool) -> Entry:
        """Known from the shape alone."""
        return {
            "scheme": self.name, "shape": list(site.shape), "bits": self.bits,
            "granularity": self.granularity, "group_size": self.group_size,
            **({"symmetric": True} if self.symmetric else {}),
        }  # fmt: skip

    @classmethod
    def check_entry(cls, entry: Entry) -> str | None:
        """Bits and granularity within bounds, groups that fill a row."""
        bits, symmetric = entry.get("bits"), entry.get("symmetric", False)
        bounds = {"group_size": GROUP_SIZES, **({} if bits == TERNARY else {"bits": BITS})}
        few = bits in (1, TERNARY)
        sound = all_whole(entry, bounds) and type(symmetric) is bool and (symmetric or not few)
        return ranges_problem(entry) if sound else "a field is missing or out of range"

    @classmethod
    def layout(cls, entry: Entry, dtype: str) -> Specs:
        """levels, and an affine map for each range.

        >>> entry = {"shape": [64, 32], "bits": 4, "granularity": "channel", "group_size": 64}
        >>> {part: shape for part, (_, shape) in Integer.layout(entry, "float16").items()}
        {'levels': (1024,), 'scale': (64,), 'zero': (64,)}
        """
        n, _ = ranges_shape(entry["shape"], entry["granularity"], entry["group_size"])
        size, bits = prod(entry["shape"]), entry["bits"]
        levels = trit_bytes(size) if bits == TERNARY else packed_bytes(size, bits)
        zero = {} if entry.get("symmetric") else {"zero": ("uint8", (n,))}
        return {"levels": ("uint8", (levels,)), "scale": ("float32", (n,)), **zero}

    def encode(self, w: Tensor, site: Site, dtype: torch.dtype) -> tuple[Entry, dict[str, Tensor]]:
        """Packed levels, and the ranges as they are."""
        found = integer.quantize(w, *self._how(site), self._present(w, site))
        levels = found.levels // 2 if self.bits == 1 else found.levels
        packed = pack_trits(levels) if self.bits == TERNARY else pack(levels, int(self.bits))
        parts = {"levels": packed, "scale": found.scale} | ({} if self.symmetric else {"zero": found.zero})
        return self.entry(w, site, dtype, learned=True), parts

    @classmethod
    def decode(cls, entry: Entry, parts: Mapping[str, Tensor]) -> StoredIntegers:
        """Levels, one in a byte, by range."""
        bits, scale = entry["bits"], parts["scale"]
        known, top = zero_and_top(bits, entry.get("symmetric", False))
        zero = parts["zero"] if known is None else torch.full(scale.shape, known, dtype=torch.uint8)
        ends = torch.stack([-zero.float(), top - zero.float()]) * scale
        if not bool(torch.isfinite(ends).all()):
            raise FormatError("expected finite weights, found NaN or Inf; save another checkpoint")
        rows, columns = ranges_shape(entry["shape"], entry["granularity"], entry["group_size"])
        n, packed = rows * columns, parts["levels"]
        levels = unpack_trits(packed, n) if bits == TERNARY else unpack(packed, bits, n)
        levels = levels * 2 if bits == 1 else levels
        if levels.numel() and int(levels.max()) > top:
            raise FormatError(f"expected levels up to {top}, found {int(levels.max())}; the file is damaged")
        return StoredIntegers(tuple(entry["shape"]), levels.reshape(rows, columns), scale, zero)

    @classmethod
    def code_bits(cls, entry: Entry) -> int:
        """Of a level; five ternary ones share a byte."""
        return 8 if entry["bits"] == TERNARY else int(entry["bits"])

    @classmethod
    def label(cls, entry: Entry) -> str:
        """int4.

        >>> [Integer.label({"bits": bits, "symmetric": True}) for bits in (1, "ternary", 4)]
        ['int1 symmetric', 'ternary', 'int4 symmetric']
        """
        named = entry["bits"] if entry["bits"] == TERNARY else f"int{entry['bits']}"
        return f"{named} symmetric" if entry.get("symmetric") and named != TERNARY else str(named)

    # -- ranges

    def _shape(self, shape: Sequence[int], name: str = "weight") -> tuple[int, int]:
        return ranges_shape(shape, self.granularity, self.group_size, name)

    def _rows(self, w: Tensor) -> Tensor:
        return integer.rows_of(w, self.granularity, self.group_size)

    def _how(self, site: Site) -> tuple[int, str, int, str]:
        bits = 2 if self.bits == TERNARY else int(self.bits)
        return bits, self.granularity, self.group_size, site.name

    def _find(self, w: Tensor) -> Ranges:
        """Of the present weights."""
        rows = self._rows(w)
        if self.ranges == LEARNED:
            return lsq.first(rows, self.bits)
        return ranges.find(rows, self.ranges, self.bits, self.symmetric)

    def _present(self, w: Tensor, site: Site) -> Ranges | None:
        """The ranges to read by; None for those of min-max as always."""
        if self._keeps:
            return self._steps(site)
        return None if self.ranges == "minmax" and not self.symmetric else self._find(w)

    def _steps(self, site: Site) -> Ranges:
        """The ranges that are kept, as training has moved them."""
        zero, top = zero_and_top(self.bits, self.symmetric)

        def kept(buffer: Tensor) -> Ranges:
            scale = buffer[0].contiguous().view(torch.float32).unsqueeze(1)
            at = buffer[1].float().unsqueeze(1) if zero is None else torch.full_like(scale, zero)
            return Ranges(scale, at, top, signs=self.bits == 1)

        found = site.derived("ranges", kept)
        return lsq.moved(found, site.parameter("step_change")) if self.ranges == LEARNED else found


def ranges_problem(entry: Entry) -> str | None:
    """What is wrong with the granularity of a record, or None; its group size is a whole number."""
    if entry.get("granularity") not in GRANULARITIES:
        return "a field is missing or out of range"
    try:
        ranges_shape(entry["shape"], entry["granularity"], entry["group_size"])
    except BlockSizeError as error:
        return str(error)
    return None
