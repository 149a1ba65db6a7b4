"""Kernel quantisation: whole k x k kernels of a convolution are codewords of a codebook, whose elements are
integers (Yu et al. 2020, "Kernel Quantization for Efficient Network Compression").

The paper's: one codebook a layer, 6 bits an element. A 1x1 kernel is a single weight, and so is each of a
Linear or Embedding: they share K values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from fairseq_qn.lines import whole
from fairseq_qn.schemes.base import Entry
from fairseq_qn.schemes.blocks import CENTROIDS, INTEGERS, Blocks


@dataclass(frozen=True)
class Kernel(Blocks):
    """An index for each kernel of [out, in / groups, k, k]."""

    name = "kernel"

    n_centroids: int = 512
    codebook_bits: int = 6

    @classmethod
    def parse(cls, fields: Mapping[str, Any], where: str) -> Kernel:
        """From `n_centroids` and `codebook_bits`. Raises RecipeError."""
        whole(fields.get("n_centroids", cls.n_centroids), CENTROIDS, f"{where}.n_centroids")
        whole(fields.get("codebook_bits", cls.codebook_bits), INTEGERS, f"{where}.codebook_bits")
        return cls(**fields)

    def d(self, shape: Sequence[int]) -> int:
        """Of a kernel."""
        return prod(shape[2:])

    @classmethod
    def d_of(cls, entry: Entry) -> int:
        """The same."""
        return prod(entry["shape"][2:])

    @classmethod
    def check_entry(cls, entry: Entry) -> str | None:
        """Integers, and what all codebooks have."""
        return super().check_entry(entry) if "scale" in entry else "a field is missing or out of range"

    @classmethod
    def label(cls, entry: Entry) -> str:
        """kernel 3x3 K512 int6.

        >>> Kernel.label({"shape": [8, 4, 3, 3], "n_centroids": 32, "scale": 0.01, "codebook_bits": 6})
        'kernel 3x3 K32 int6'
        """
        kernel = "x".join(map(str, entry["shape"][2:])) or "1x1"
        return f"kernel {kernel} {cls.codebook_label(entry)}"
