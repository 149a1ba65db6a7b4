"""Integers of 2 to 15 bits, a width learned for each group of weights (quant/learned_bits.py).

levels  uint8 [n]             the groups of the least width, those of the next, ...: g * b bits each
widths  uint8 [m]             less min_bits, ceil(log2(max_bits - min_bits + 1)) bits each; none of 0 bits
range   fp32 [2]              least and greatest weight
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from fairseq_qn.errors import FormatError
from fairseq_qn.lines import one_of, whole
from fairseq_qn.quant import learned_bits, noise
from fairseq_qn.quant.bitpack import pack, packed_bytes, unpack
from fairseq_qn.quant.integer import ranges_shape
from fairseq_qn.quant.learned_bits import NOISES, affine, bits_of, stream_bytes, widths_of
from fairseq_qn.schemes.base import Draw, Entry, Scheme, Site, Specs, Stored, all_whole, distortion
from fairseq_qn.schemes.integer import GRANULARITIES, GROUP_SIZES, ranges_problem

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 15)
WIDTHS = 16  # of the table of zeros: 0 .. 15


@dataclass(frozen=True)
class StoredLearnedBits(Stored):
    """levels uint8 or int16 [n_groups, g], widths uint8 [n_groups], range [2], zero int16 [16] by width."""

    TENSORS, PREFIX = ("levels", "widths", "range", "zero"), "Mixed"

    levels: Tensor
    widths: Tensor
    range: Tensor
    zero: Tensor

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The de-quantised weight."""
        return self._dense(self.levels, self.widths).view(self.shape).to(dtype or self.range.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Only what is asked for is de-quantised."""
        rows, columns = self.shape
        groups = max(1, len(self.widths) // rows)  # of each row
        widths = torch.nn.functional.embedding(ids, self.widths.view(-1, groups).expand(rows, -1)).flatten()
        levels = torch.nn.functional.embedding(ids, self.levels.view(rows, columns)).view(
            -1, columns // groups
        )
        return self._dense(levels, widths).view(*ids.shape, columns).to(self.range.dtype)

    def _dense(self, levels: Tensor, widths: Tensor) -> Tensor:
        """fp32, of the levels' shape [n, g]."""
        step, _ = affine(self.range, widths)
        zero = self.zero[widths.int()].unsqueeze(1)
        return levels.float().sub_(zero).mul_(step.unsqueeze(1))


@dataclass(frozen=True)
class LearnedBits(Scheme):
    """A logit for each tensor, channel or group of `group_size` in a row: the Parameter `bit_logits`.

    `freeze` fixes the widths, which the buffer `widths` then holds; before, it holds zeros. The weights
    train on, straight through. Whatever the kind of noise, weights that are drawn read with pseudo-noise.
    """

    name, coded_parts = "learned_bits", ("levels",)
    buffer_names, parameter_names, rated_names = ("widths",), ("bit_logits",), ("bit_logits",)
    rounds_in_evaluation = True

    group_size: int = 16
    granularity: str = "group"
    min_bits: int = 2
    max_bits: int = 15
    pseudo_noise: str = "gaussian"

    # -- recipe

    @classmethod
    def parse(cls, fields: Mapping[str, Any], where: str) -> LearnedBits:
        """From its fields. Raises RecipeError."""
        whole(fields.get("group_size", cls.group_size), GROUP_SIZES, f"{where}.group_size")
        one_of(fields.get("granularity", cls.granularity), GRANULARITIES, f"{where}.granularity")
        one_of(fields.get("pseudo_noise", cls.pseudo_noise), NOISES, f"{where}.pseudo_noise")
        least = whole(fields.get("min_bits", cls.min_bits), BITS, f"{where}.min_bits")
        whole(fields.get("max_bits", cls.max_bits), (least, BITS[1]), f"{where}.max_bits")
        return cls(**fields)

    def check(self, shape: Sequence[int], name: str) -> None:
        """Raise BlockSizeError unless groups fill a row."""
        self._groups(shape, name)

    def _groups(self, shape: Sequence[int], name: str = "weight") -> tuple[int, int]:
        """[n_groups, weights a group]."""
        return ranges_shape(shape, self.granularity, self.group_size, name)

    # -- training

    def buffers(self, shape: Sequence[int], padding_idx: int | None) -> dict[str, Tensor]:
        """widths uint8 [n_groups], 0 until they are fixed."""
        return {"widths": torch.zeros(self._groups(shape)[0], dtype=torch.uint8)}

    def parameters(self, shape: Sequence[int]) -> dict[str, Tensor]:
        """bit_logits [n_groups]."""
        first = learned_bits.first_logit(self.min_bits, self.max_bits)
        return {"bit_logits": torch.full((self._groups(shape)[0],), first)}

    def _widths(self, site: Site) -> Tensor:
        fixed = site.derived("widths", lambda widths: bool(widths.any()))
        logits = site.parameter("bit_logits")
        return site.buffer("widths") if fixed else widths_of(logits, self.min_bits, self.max_bits)

    def _rounded(self, w: Tensor, widths: Tensor) -> Tensor:
        rows = w.detach().reshape(self._groups(w.shape))
        return learned_bits.fake_quantize(rows, widths).view(w.shape)

    def quantized(self, w: Tensor, site: Site) -> Tensor:
        """Rounded, at rounded widths."""
        return self._rounded(w, self._widths(site))

    def noised(self, w: Tensor, site: Site, draw: Draw) -> Tensor:
        """Weights drawn read with pseudo-noise, of the step of their group's bits; a padding row without."""
        drawn = learned_bits.pseudo_noise(w.numel(), self.pseudo_noise, draw.seed, w.device)
        if not noise.is_certain(draw.p):
            drawn.mul_(noise.bernoulli(w.numel(), draw.p, noise.seed_of(draw.seed, "drawn"), w.device))
        if site.padding_idx is not None:
            drawn.view(w.shape)[site.padding_idx] = 0
        shape, bits = (
            self._groups(w.shape),
            bits_of(site.parameter("bit_logits"), self.min_bits, self.max_bits),
        )
        value = learned_bits.noised(w.reshape(shape), bits, drawn.view(shape)).view(w.shape)
        return (
            value if torch.is_grad_enabled() else value.requires_grad_(w.requires_grad)
        )  # see reading.read

    def learn(self, w: Tensor, site: Site, warm: bool, iterations: int, seed: int) -> float:
        """Fix the widths."""
        widths = widths_of(site.parameter("bit_logits"), self.min_bits, self.max_bits)
        site.buffer("widths").copy_(widths)
        return distortion(w, self._rounded(w, widths))

    def misfit(self, found: Mapping[str, Tensor], site: Site) -> str | None:
        """Widths out of bounds; all 0 before they are fixed."""
        widths = found["widths"]
        if not bool(widths.any()) or bool(((widths >= self.min_bits) & (widths <= self.max_bits)).all()):
            return None
        return f"expected widths of {self.min_bits} to {self.max_bits} bits, found others"

    def fingerprint(self, site: Site) -> dict[str, int]:
        """The bounds, and the weights of a group."""
        return {"min_bits": self.min_bits, "max_bits": self.max_bits, "group": self._groups(site.shape)[1]}

    def size(self, site: Site) -> Tensor:
        """Levels by real-valued bits, until the widths are fixed; the widths themselves; the range."""
        groups, each = self._groups(site.shape)
        fixed = site.derived("widths", lambda widths: bool(widths.any()))
        logits = site.parameter("bit_logits")
        bits = site.buffer("widths").float() if fixed else bits_of(logits, self.min_bits, self.max_bits)
        return each * bits.sum() + groups * (self.max_bits - self.min_bits).bit_length() + 64

    # -- file

    def entry(self, w: Tensor, site: Site, dtype: torch.dtype, learned: bool) -> Entry:
        """Its size goes by the widths as they are."""
        size = stream_bytes(self._widths(site), self._groups(site.shape)[1])
        return {
            "scheme": self.name, "shape": list(site.shape), "granularity": self.granularity,
            "group_size": self.group_size, "min_bits": self.min_bits, "max_bits": self.max_bits,
            "bytes": size,
        }  # fmt: skip

    @classmethod
    def check_entry(cls, entry: Entry) -> str | None:
        """Bounds, groups that fill a row, and bytes that some widths add up to."""
        legal = all_whole(entry, {"min_bits": BITS, "max_bits": BITS, "group_size": GROUP_SIZES})
        if problem := ranges_problem(entry) if legal else "a field is missing or out of range":
            return problem
        n, least, most = prod(entry["shape"]), entry["min_bits"], entry["max_bits"]
        most_bytes = packed_bytes(n, most) + most - least  # each width that occurs may fill up a byte
        if least > most or not all_whole(entry, {"bytes": (packed_bytes(n, least), most_bytes)}):
            return f"bytes: expected those of {n} weights of {least} to {most} bits"
        return None

    @classmethod
    def layout(cls, entry: Entry, dtype: str) -> Specs:
        """levels, widths unless they are all the same, range.

        >>> entry = {"shape": [64, 32], "granularity": "group", "group_size": 16, "bytes": 1024}
        >>> specs = LearnedBits.layout(entry | {"min_bits": 2, "max_bits": 15}, "float16")
        >>> {part: shape for part, (_, shape) in specs.items()}
        {'levels': (1024,), 'widths': (64,), 'range': (2,)}
        """
        groups, _ = ranges_shape(entry["shape"], entry["granularity"], entry["group_size"])
        of_width = (entry["max_bits"] - entry["min_bits"]).bit_length()
        widths: Specs = {"widths": ("uint8", (packed_bytes(groups, of_width),))} if of_width else {}
        return {"levels": ("uint8", (entry["bytes"],)), **widths, "range": ("float32", (2,))}

    def encode(self, w: Tensor, site: Site, dtype: torch.dtype) -> tuple[Entry, dict[str, Tensor]]:
        """Packed levels and widths, and the range as it is."""
        widths, rows = self._widths(site).cpu(), w.detach().reshape(self._groups(w.shape)).cpu()
        levels, _, zero = learned_bits.quantize(rows, widths)
        parts = {"levels": learned_bits.pack_groups(levels.add_(zero).to(torch.int16), widths)}
        if of_width := (self.max_bits - self.min_bits).bit_length():
            parts["widths"] = pack(widths - self.min_bits, of_width)
        return self.entry(w, site, dtype, learned=True), parts | {"range": learned_bits.range_of(rows)}

    @classmethod
    def decode(cls, entry: Entry, parts: Mapping[str, Tensor]) -> StoredLearnedBits:
        """Levels, each in a byte or two, by group. Raises FormatError."""
        least, most, ends = entry["min_bits"], entry["max_bits"], parts["range"]
        groups, size = ranges_shape(entry["shape"], entry["granularity"], entry["group_size"])
        widths = torch.full((groups,), least, dtype=torch.uint8)
        if "widths" in parts:
            widths += unpack(parts["widths"], (most - least).bit_length(), groups)
        if int(widths.max()) > most:
            raise FormatError(f"widths: expected at most {most} bits, found {int(widths.max())}; damaged")
        every = torch.arange(WIDTHS).clamp_(min=1)
        step, zero = affine(ends, every)
        found = torch.stack([step * zero, step * ((1 << every) - 1 - zero)])  # what the widths decode to
        if not bool(torch.isfinite(found).all()) or ends[0] > 0 or ends[1] < 0:
            raise FormatError(f"range: expected finite ends around 0, found {ends.tolist()}; damaged")
        levels = learned_bits.unpack_groups(parts["levels"], widths, size)
        return StoredLearnedBits(tuple(entry["shape"]), levels, widths, ends, zero.to(torch.int16))

    @classmethod
    def label(cls, entry: Entry) -> str:
        """5.3 bits."""
        return f"{8 * entry['bytes'] / prod(entry['shape']):.1f} bits"
