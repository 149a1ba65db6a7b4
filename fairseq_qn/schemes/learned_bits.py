"""Integers of 2 to 15 bits, a width learned for each group of weights (quant/learned_bits.py).

levels  uint8 [n]             the groups of the least width, those of the next, ...: g * b bits each
widths  uint8 [m]             less min_bits, ceil(log2(max_bits - min_bits + 1)) bits each; none of 0 bits
ends    fp32 [2]              least and greatest weight; `range` where 0 is a level, as files had it at first

min_bits and max_bits of an entry are the least and the greatest width that occurs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from fairseq_qn.errors import FormatError
from fairseq_qn.lines import one_of, whole
from fairseq_qn.quant import learned_bits
from fairseq_qn.quant.bitpack import pack, packed_bytes, unpack
from fairseq_qn.quant.integer import ranges_shape
from fairseq_qn.quant.learned_bits import NOISES, bits_of, range_of, stream_bytes, widths_of
from fairseq_qn.schemes.base import Draw, Entry, Scheme, Site, Specs, Stored, all_whole
from fairseq_qn.schemes.integer import GRANULARITIES, GROUP_SIZES, ranges_problem

if TYPE_CHECKING:
    from torch import Tensor

BITS = (2, 15)


@dataclass(frozen=True)
class StoredLearnedBits(Stored):
    """levels uint8 or int16 [n_groups, g], widths uint8 [n_groups], step and centre [16] by width; a row
    that is zero.
    """

    TENSORS, PREFIX = ("levels", "widths", "step", "centre"), "Mixed"

    levels: Tensor
    widths: Tensor
    step: Tensor
    centre: Tensor
    zero_row: int | None = None

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The de-quantised weight."""
        weight = self._dense(self.levels, self.widths).view(self.shape)
        if self.zero_row is not None:
            weight[self.zero_row] = 0
        return weight.to(dtype or self.step.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Only what is asked for is de-quantised."""
        rows, columns = self.shape
        groups = max(1, len(self.widths) // rows)  # of each row
        widths = torch.nn.functional.embedding(ids, self.widths.view(-1, groups).expand(rows, -1)).flatten()
        levels = torch.nn.functional.embedding(ids, self.levels.view(rows, columns))
        found = self._dense(levels.view(-1, columns // groups), widths).view(*ids.shape, columns)
        if self.zero_row is not None:
            found = found.masked_fill_((ids == self.zero_row).unsqueeze(-1), 0)
        return found.to(self.step.dtype)

    def _dense(self, levels: Tensor, widths: Tensor) -> Tensor:
        """fp32, of the levels' shape [n, g]."""
        return learned_bits.dequantize(levels.float(), widths, self.step.float(), self.centre.float())


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

    def quantized(self, w: Tensor, site: Site) -> Tensor:
        """Rounded, at rounded widths; a padding row of zeros as it is."""
        rows = w.detach().reshape(self._groups(w.shape))
        found = learned_bits.fake_quantize(rows, self._widths(site)).view(w.shape)
        if site.padding_idx is not None:
            found[site.padding_idx] *= w[site.padding_idx].any()
        return found

    def noised(self, w: Tensor, site: Site, draw: Draw) -> Tensor:
        """Weights drawn read with pseudo-noise, of the step of their group's bits; a padding row without."""
        row, pad = w.numel() // w.shape[0], site.padding_idx
        skip = (0, 0) if pad is None else (pad * row, row)
        drawn = learned_bits.PseudoNoise(self.pseudo_noise, draw.seed, draw.p, skip)
        bits = bits_of(site.parameter("bit_logits"), self.min_bits, self.max_bits)
        return learned_bits.noised(w.reshape(self._groups(w.shape)), bits, drawn).view(w.shape)

    def learn(self, w: Tensor, site: Site, warm: bool, iterations: int, seed: int) -> float:
        """Fix the widths."""
        widths = widths_of(site.parameter("bit_logits"), self.min_bits, self.max_bits)
        site.buffer("widths").copy_(widths)
        return super().learn(w, site, warm, iterations, seed)

    def misfit(self, found: Mapping[str, Tensor], site: Site) -> str | None:
        """Widths out of bounds; all 0 before they are fixed."""
        widths = found["widths"]
        if not bool(widths.any()) or bool(((widths >= self.min_bits) & (widths <= self.max_bits)).all()):
            return None
        return f"expected widths of {self.min_bits} to {self.max_bits} bits, found others"

    def fingerprint(self, site: Site) -> dict[str, int]:
        """The bounds, and the weights of a group."""
        return {"min_bits": self.min_bits, "max_bits": self.max_bits, "group": self._groups(site.shape)[1]}

    def size(self, site: Site, rounded: bool) -> Tensor:
        """Levels, the widths themselves, the range."""
        if site.derived("widths", lambda widths: bool(widths.any())):
            bits = site.buffer("widths").float()
        else:
            bits = bits_of(site.parameter("bit_logits"), self.min_bits, self.max_bits)
            bits = bits + (bits.round() - bits).detach() if rounded else bits
        return learned_bits.size_of(bits, self._groups(site.shape)[1]) + 64

    # -- file

    def entry(self, w: Tensor, site: Site, dtype: torch.dtype, learned: bool) -> Entry:
        """Its size goes by the widths as they are."""
        widths, pad = self._widths(site), site.padding_idx
        least, most = widths.aminmax()
        return {
            "scheme": self.name, "shape": list(site.shape), "granularity": self.granularity,
            "group_size": self.group_size, "min_bits": int(least), "max_bits": int(most),
            "bytes": stream_bytes(widths, self._groups(site.shape)[1]), "grid": "ends",
            **({} if pad is None or bool(w[pad].any()) else {"zero_row": pad}),
        }  # fmt: skip

    @classmethod
    def check_entry(cls, entry: Entry) -> str | None:
        """Bounds, groups that fill a row, a row that there is, and bytes that some widths add up to."""
        legal = all_whole(entry, {"min_bits": BITS, "max_bits": BITS, "group_size": GROUP_SIZES})
        if problem := ranges_problem(entry) if legal else "a field is missing or out of range":
            return problem
        row = {"zero_row": (0, entry["shape"][0] - 1)} if "zero_row" in entry else {}
        if entry.get("grid", "ends") != "ends" or not all_whole(entry, row):
            return "a field is missing or out of range"
        n, least, most = prod(entry["shape"]), entry["min_bits"], entry["max_bits"]
        most_bytes = packed_bytes(n, most) + most - least  # each width that occurs may fill up a byte
        if least > most or not all_whole(entry, {"bytes": (packed_bytes(n, least), most_bytes)}):
            return f"bytes: expected those of {n} weights of {least} to {most} bits"
        return None

    @classmethod
    def layout(cls, entry: Entry, dtype: str) -> Specs:
        """levels, widths unless they are all the same, ends.

        >>> entry = {"shape": [64, 32], "granularity": "group", "group_size": 16, "bytes": 1024}
        >>> specs = LearnedBits.layout(entry | {"min_bits": 2, "max_bits": 15, "grid": "ends"}, "float16")
        >>> {part: shape for part, (_, shape) in specs.items()}
        {'levels': (1024,), 'widths': (64,), 'ends': (2,)}
        """
        groups, _ = ranges_shape(entry["shape"], entry["granularity"], entry["group_size"])
        of_width = (entry["max_bits"] - entry["min_bits"]).bit_length()
        widths: Specs = {"widths": ("uint8", (packed_bytes(groups, of_width),))} if of_width else {}
        return {"levels": ("uint8", (entry["bytes"],)), **widths, _ends(entry): ("float32", (2,))}

    def encode(self, w: Tensor, site: Site, dtype: torch.dtype) -> tuple[Entry, dict[str, Tensor]]:
        """Packed levels and widths, and the range as it is."""
        entry = self.entry(w, site, dtype, learned=True)
        widths, rows = self._widths(site).cpu(), w.detach().reshape(self._groups(w.shape)).cpu()
        ends = range_of(rows)
        levels = learned_bits.quantize(rows, widths, *learned_bits.grid(ends)).to(torch.int16)
        parts = {"levels": learned_bits.pack_groups(levels, widths), "ends": ends}
        if of_width := (entry["max_bits"] - entry["min_bits"]).bit_length():
            parts["widths"] = pack(widths - entry["min_bits"], of_width)
        return entry, parts

    @classmethod
    def decode(cls, entry: Entry, parts: Mapping[str, Tensor]) -> StoredLearnedBits:
        """Levels, each in a byte or two, by group. Raises FormatError."""
        least, most, ends = entry["min_bits"], entry["max_bits"], parts[_ends(entry)]
        groups, size = ranges_shape(entry["shape"], entry["granularity"], entry["group_size"])
        widths = torch.full((groups,), least, dtype=torch.uint8)
        if "widths" in parts:
            widths += unpack(parts["widths"], (most - least).bit_length(), groups)
        if int(widths.max()) > most:
            raise FormatError(f"widths: expected at most {most} bits, found {int(widths.max())}; damaged")
        step, centre = (learned_bits.grid if "grid" in entry else learned_bits.grid_of_zero)(ends)
        half = learned_bits.tops(ends.device) / 2 * step
        found = torch.stack([centre - half, centre + half])[:, least : most + 1]
        if not bool(torch.isfinite(found).all() and ends[0] <= ends[1]):
            raise FormatError(f"range: expected finite ends in order, found {ends.tolist()}; damaged")
        levels = learned_bits.unpack_groups(parts["levels"], widths, size)
        shape = tuple(entry["shape"])
        return StoredLearnedBits(shape, levels, widths, step, centre, entry.get("zero_row"))

    @classmethod
    def label(cls, entry: Entry) -> str:
        """5.3 bits."""
        return f"{8 * entry['bytes'] / prod(entry['shape']):.1f} bits"


def _ends(entry: Entry) -> str:
    """The part that holds the range. Readers that put 0 among the levels do not find theirs."""
    return "ends" if "grid" in entry else "range"
