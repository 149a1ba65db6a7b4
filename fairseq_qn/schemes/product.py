"""Product quantisation: blocks of d weights share K codewords (Fan et al. 2020, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fairseq_qn.lines import one_of, whole
from fairseq_qn.schemes.base import Entry, Site, all_whole
from fairseq_qn.schemes.blocks import CENTROIDS, FLOAT, INTEGERS, Blocks

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_SIZES, CODEBOOK_BITS = (1, 4096), (*range(1, 9), FLOAT)


@dataclass(frozen=True)
class Product(Blocks):
    """Blocks of `block_size` weights along the input."""

    name = "product"

    block_size: int = 8
    n_centroids: int = 256
    codebook_bits: int = FLOAT

    @classmethod
    def parse(cls, fields: Mapping[str, Any], where: str) -> Product:
        """From `block_size`, `n_centroids` and `codebook_bits`. Raises RecipeError."""
        whole(fields.get("block_size", cls.block_size), BLOCK_SIZES, f"{where}.block_size")
        whole(fields.get("n_centroids", cls.n_centroids), CENTROIDS, f"{where}.n_centroids")
        bits = whole(fields.get("codebook_bits", FLOAT), (INTEGERS[0], FLOAT), f"{where}.codebook_bits")
        one_of(bits, CODEBOOK_BITS, f"{where}.codebook_bits")
        return cls(**fields)

    def d(self, shape: Sequence[int]) -> int:
        """As the recipe says."""
        return self.block_size

    @classmethod
    def d_of(cls, entry: Entry) -> int:
        """As the record says."""
        size: int = entry["block_size"]
        return size

    def entry(self, w: Tensor, site: Site, dtype: torch.dtype, learned: bool) -> Entry:
        """With the size of its blocks."""
        return super().entry(w, site, dtype, learned) | {"block_size": self.block_size}

    @classmethod
    def check_entry(cls, entry: Entry) -> str | None:
        """Blocks of a size within bounds, and what all codebooks have."""
        sound = all_whole(entry, {"block_size": BLOCK_SIZES})
        return super().check_entry(entry) if sound else "a field is missing or out of range"

    @classmethod
    def label(cls, entry: Entry) -> str:
        """PQ d8 K256.

        >>> Product.label({"block_size": 8, "n_centroids": 256, "scale": 0.01})
        'PQ d8 K256 int8'
        """
        return f"PQ d{entry['block_size']} {cls.codebook_label(entry)}"
