"""A scheme that only tests know: the sign of each weight, times the mean of all sizes and a gain that is
learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fairseq_qn.errors import FormatError
from fairseq_qn.lines import whole
from fairseq_qn.quant import noise
from fairseq_qn.quant.bitpack import pack, packed_bytes, unpack
from fairseq_qn.quant.reading import read
from fairseq_qn.schemes.base import Draw, Entry, Scheme, Site, Specs, Stored, all_whole


@dataclass(frozen=True)
class StoredSigns(Stored):
    TENSORS, PREFIX = ("signs", "size"), "Toy"

    signs: Tensor
    size: Tensor

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        size = self.size if dtype is None else self.size.to(dtype)
        return torch.where(self.signs.bool(), size, -size)

    def rows(self, ids: Tensor) -> Tensor:
        return torch.where(self.signs[ids].bool(), self.size, -self.size)


@dataclass(frozen=True)
class Toy(Scheme):
    name, buffer_names, coded_parts, shares_gradients = "toy", ("signs",), ("signs",), True
    parameter_names = ("gain",)

    toy_times: int = 1  # the size, times this

    @classmethod
    def parse(cls, fields: Mapping[str, Any], where: str) -> Toy:
        return cls(whole(fields.get("toy_times", 1), (1, 9), f"{where}.toy_times"))

    def check(self, shape: Sequence[int], name: str) -> None:
        pass

    def buffers(self, shape: Sequence[int], padding_idx: int | None) -> dict[str, Tensor]:
        return {"signs": torch.zeros(tuple(shape), dtype=torch.uint8)}

    def parameters(self, shape: Sequence[int]) -> dict[str, Tensor]:
        return {"gain": torch.zeros(1)}

    def _size(self, w: Tensor, site: Site) -> Tensor:
        return w.float().abs().mean() * self.toy_times * (1 + site.parameter("gain").detach().float())

    def _moved(self, value: Tensor, site: Site, share: Tensor | float) -> Tensor:
        """The value, which moves by `share` as the gain does."""
        gain = site.parameter("gain")
        return value + (gain - gain.detach()) * share

    def quantized(self, w: Tensor, site: Site) -> Tensor:
        signs = site.derived("signs", lambda codes: codes.float() * 2 - 1)
        return (signs * self._size(w, site)).to(w.dtype)

    def frozen(self, w: Tensor, site: Site) -> Tensor:
        value = super().frozen(w, site)
        return self._moved(value, site, value.detach()) if torch.is_grad_enabled() else value

    def noised(self, w: Tensor, site: Site, draw: Draw) -> Tensor:
        mask = noise.bernoulli(w.numel(), draw.p, draw.seed, w.device).view(w.shape)
        phi = self.quantized(w.detach(), site) if draw.kind == "exact" else torch.zeros_like(w)
        value = read(w, lambda weight: torch.where(mask, phi, weight), None)
        return self._moved(value, site, phi * mask)

    def needs_learning(self, kind: str) -> bool:
        return kind == "exact"

    def learn(self, w: Tensor, site: Site, warm: bool, iterations: int, seed: int) -> float:
        site.buffer("signs").copy_(w >= 0)
        approximation = self._size(w, site) * torch.where(w >= 0, 1.0, -1.0)
        norm = float(w.float().square().sum())
        return float((w - approximation).float().square().sum()) / norm if norm else 0.0

    def moment(self, moment: Tensor, site: Site, *, squared: bool) -> Tensor:
        mean = moment.mean() / (moment.numel() if squared else 1)
        return mean.expand_as(moment)

    def misfit(self, found: Mapping[str, Tensor], site: Site) -> str | None:
        return "expected signs of 0 and 1" if found["signs"].numel() and found["signs"].max() > 1 else None

    def fingerprint(self, site: Site) -> dict[str, int]:
        return {"toy_times": self.toy_times}

    def entry(self, w: Tensor, site: Site, dtype: torch.dtype, learned: bool) -> Entry:
        return {"scheme": self.name, "shape": list(site.shape), "times": self.toy_times}

    @classmethod
    def check_entry(cls, entry: Entry) -> str | None:
        return None if all_whole(entry, {"times": (1, 9)}) else "times: expected 1 to 9"

    @classmethod
    def layout(cls, entry: Entry, dtype: str) -> Specs:
        return {
            "signs": ("uint8", (packed_bytes(prod(entry["shape"]), 1),)),
            "size": ("float32", (1,)),
        }

    def encode(self, w: Tensor, site: Site, dtype: torch.dtype) -> tuple[Entry, dict[str, Tensor]]:
        parts = {"signs": pack(site.buffer("signs"), 1), "size": self._size(w, site).reshape(1)}
        return self.entry(w, site, dtype, learned=True), parts

    @classmethod
    def decode(cls, entry: Entry, parts: Mapping[str, Tensor]) -> StoredSigns:
        if not bool(torch.isfinite(parts["size"]).all()):
            raise FormatError("expected finite weights, found NaN or Inf")
        signs = unpack(parts["signs"], 1, prod(entry["shape"])).reshape(entry["shape"])
        return StoredSigns(tuple(entry["shape"]), signs, parts["size"])

    @classmethod
    def label(cls, entry: Entry) -> str:
        return f"toy x{entry['times']}"
