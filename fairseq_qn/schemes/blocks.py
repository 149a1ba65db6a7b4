"""What schemes share whose blocks of d weights are codewords of a codebook [K, d]: all but their blocks.

codes     uint8 [ceil(n_blocks * bits / 8)]    packed at ceil(log2 K) bits
codebook  fp16 or fp32 [K, d], times 2^exponent; or integers, times `scale`: int8 [K, d], or uint8 [m],
          packed at `codebook_bits`
pad       fp16 or fp32 [embedding_dim], times 2^pad: the pad row, unless it is zero
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import isfinite, prod
from typing import TYPE_CHECKING

import torch

from fairseq_qn.errors import BlockSizeError, FormatError
from fairseq_qn.kernels import lookup
from fairseq_qn.quant import noise, product, reading
from fairseq_qn.quant.bitpack import pack, packed_bytes, unpack
from fairseq_qn.quant.blocks import check_block_size, codes_shape
from fairseq_qn.quant.half import exponent_of, narrowed, widened
from fairseq_qn.schemes.base import EXPONENTS, Draw, Entry, Scheme, Site, Specs, Stored, all_whole

if TYPE_CHECKING:
    from torch import Tensor

CENTROIDS, INTEGERS, FLOAT = (2, 65_536), (1, 8), 16  # K; bits of integers, and of what is none


@dataclass(frozen=True)
class StoredProduct(Stored):
    """codes [out_features, blocks a row], codebook [K, d]; pad_row [embedding_dim], unless it is zero.

    scale: of a codebook that is integers in the file.
    """

    TENSORS, PREFIX = ("codes", "codebook", "pad_row"), "PQ"

    codes: Tensor
    codebook: Tensor
    padding_idx: int | None = None
    pad_row: Tensor | None = None
    scale: float | None = None

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight."""
        codebook = self.codebook if dtype is None else self.codebook.to(dtype)
        return product.decode(self.codes, codebook, self.shape, self.padding_idx, self.pad_row)

    def rows(self, ids: Tensor) -> Tensor:
        """Only what is asked for is decoded."""
        rows = torch.nn.functional.embedding(
            torch.nn.functional.embedding(ids, self.codes).int(), self.codebook
        ).flatten(-2)
        if self.padding_idx is None:
            return rows
        is_pad = (ids == self.padding_idx).unsqueeze(-1)
        return (
            rows.masked_fill(is_pad, 0) if self.pad_row is None else torch.where(is_pad, self.pad_row, rows)
        )

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """By lookup; sums are rounded to x's dtype. x [..., in_features]."""
        if not lookup.usable(self.codes, self.codebook):
            return None
        dtype, pad = x.dtype, self.padding_idx
        bias = None if bias is None else bias.float()
        y = lookup.linear(x.float(), self.codes, self.codebook.to(dtype).float(), bias)
        if pad is not None:
            y[..., pad] = 0 if self.pad_row is None else x.float() @ self.pad_row.to(dtype).float()
            if bias is not None:
                y[..., pad] += bias[pad]
        return y.to(dtype)

    def signed(self) -> tuple[Tensor, Tensor] | None:
        """Where the codebook is integers: all weights then have its one scale."""
        if self.scale is None or self.pad_row is not None:
            return None
        codebook = (self.codebook.float() / self.scale).round_().to(torch.int8)
        levels = product.decode(self.codes, codebook, self.shape, self.padding_idx)
        return levels, self.codebook.new_tensor([self.scale])


@dataclass(frozen=True)
class Blocks(Scheme):
    """At most `n_centroids` codewords, whose elements have `codebook_bits`: 16, floating point, in the dtype
    of a file's parts; or 1 to 8, integers with one scale, which training reads as well.
    """

    buffer_names, coded_parts, shares_gradients = ("codes",), ("codes",), True

    @property
    @abstractmethod
    def n_centroids(self) -> int:
        """K at most."""

    @property
    @abstractmethod
    def codebook_bits(self) -> int:
        """Of an element."""

    @abstractmethod
    def d(self, shape: Sequence[int]) -> int:
        """Weights of a block."""

    @classmethod
    @abstractmethod
    def d_of(cls, entry: Entry) -> int:
        """The same of a record that was checked."""

    def check(self, shape: Sequence[int], name: str) -> None:
        """Raise BlockSizeError unless the blocks tile a weight of this shape."""
        check_block_size(shape, self.d(shape), name)

    # -- training

    def buffers(self, shape: Sequence[int], padding_idx: int | None) -> dict[str, Tensor]:
        """codes [out_features, blocks a row], all zero."""
        dtype = product.codes_dtype(self._n_codewords(shape, padding_idx))
        return {"codes": torch.zeros(codes_shape(shape, self.d(shape)), dtype=dtype)}

    def n_codewords(self, site: Site) -> int:
        """K, clipped to the number of blocks."""
        return self._n_codewords(site.shape, site.padding_idx)

    def groups(self, site: Site) -> product.Groups:
        """The blocks sorted by code."""
        group = partial(product.Groups.of, n_centroids=self.n_codewords(site), padding_idx=site.padding_idx)
        return site.derived("codes", group)

    def codebook(self, w: Tensor, site: Site, bits: int = FLOAT) -> Tensor:
        """fp32 [K, d]: the mean of the blocks of each code."""
        return product.codebook_of(w, self.groups(site), self.d(w.shape), bits).float()

    def quantized(self, w: Tensor, site: Site) -> Tensor:
        """Each block's codeword, by the present codes."""
        return product.project(w, self.groups(site), self.d(w.shape), self.codebook_bits)

    def frozen(self, w: Tensor, site: Site) -> Tensor:
        """A projection, its own derivative: codewords move by the mean of their blocks' gradients, straight
        through their rounding.
        """
        project = partial(product.project, groups=self.groups(site), block_size=self.d(w.shape))
        return reading.read(w, partial(project, bits=self.codebook_bits), project)

    def noised(self, w: Tensor, site: Site, draw: Draw) -> Tensor:
        """Blocks drawn read as 0 (proxy), or as their codewords (exact)."""
        return reading.read(w, partial(self._noised, site=site, draw=draw), None)

    def _noised(self, w: Tensor, site: Site, draw: Draw) -> Tensor:
        exact = draw.kind == "exact"
        if exact and noise.is_certain(draw.p):
            return self.quantized(w, site)
        d = self.d(w.shape)
        mask = noise.bernoulli(w.numel() // d, draw.p, draw.seed, w.device)
        if not exact:
            return noise.drop_blocks(w, mask, d)
        if w.device.type == "cpu":
            return product.project_some(w, self.groups(site), d, mask, self.codebook_bits)
        return noise.replace_blocks(w, self.quantized(w, site), mask, d)

    def needs_learning(self, kind: str) -> bool:
        """Exact noise needs codes."""
        return kind == "exact"

    def learn(self, w: Tensor, site: Site, warm: bool, iterations: int, seed: int) -> float:
        """Codes by k-means."""
        pad = site.padding_idx
        codes, clusters = product.learn(
            w, self.d(w.shape), self.n_codewords(site), padding_idx=pad, iterations=iterations, seed=seed,
            start=self.codebook(w, site) if warm else None, name=site.name,
        )  # fmt: skip
        site.buffer("codes").copy_(codes)
        lost = clusters.objective
        if self.codebook_bits < FLOAT:  # a block's distance from a mean, and that mean's from its rounding
            integers = product.to_integers(clusters.codebook, self.codebook_bits)
            moved = product.of_integers(*integers) - clusters.codebook
            counts = torch.bincount(clusters.codes, minlength=len(moved))
            lost += float(moved.double().square().sum(1) @ counts.double())
        # the pad row is exact
        total = clusters.energy + (0.0 if pad is None else float(w[pad].double().square().sum()))
        return lost / total if total > 0 else 0.0

    def moment(self, moment: Tensor, site: Site, *, squared: bool) -> Tensor:
        """That of each block's codeword: the mean, and of squares the mean / |J|; pad row as it was."""
        return product.project_moment(moment, self.groups(site), self.d(moment.shape), squared=squared)

    def misfit(self, found: Mapping[str, Tensor], site: Site) -> str | None:
        """Codes beyond the codebook."""
        codes, k = found["codes"], self.n_codewords(site)
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < k:
            return f"expected codes below {k}, found {int(codes.min())} to {int(codes.max())}"
        return None

    def fingerprint(self, site: Site) -> dict[str, int]:
        """Block size, and K as clipped: codes serve a codebook of any width."""
        return {"block_size": self.d(site.shape), "n_centroids": self.n_codewords(site)}

    # -- file

    def entry(self, w: Tensor, site: Site, dtype: torch.dtype, learned: bool) -> Entry:
        """Its exponents and scale are exact once the codes are learned."""
        pad, values = _pad_row(w, site), self.codebook(w, site) if learned else w
        bits = self.codebook_bits
        if bits < FLOAT:
            scale = float(product.scale_of(values, bits))
            unit: Entry = {"scale": scale if isfinite(scale) else 1.0}
            unit |= {} if bits == 8 else {"codebook_bits": bits}
        else:
            unit = {"exponent": exponent_of(values, dtype) if learned else 0}
        return {
            "scheme": self.name, "shape": list(site.shape), "n_centroids": self.n_codewords(site),
            "padding_idx": site.padding_idx, **unit,
            **({} if pad is None else {"pad": exponent_of(pad, dtype)}),
        }  # fmt: skip

    @classmethod
    def check_entry(cls, entry: Entry) -> str | None:
        """Sizes within bounds, blocks that tile the shape, a pad row only where there is a pad index."""
        bounds = {"n_centroids": (1, CENTROIDS[1])}
        bounds |= {} if "scale" in entry else {"exponent": EXPONENTS}
        bounds |= {"codebook_bits": INTEGERS} if "codebook_bits" in entry else {}
        bounds |= {"pad": EXPONENTS} if "pad" in entry else {}
        padding, scale = entry.get("padding_idx", -1), entry.get("scale", 1.0)
        legal = padding is None or (type(padding) is int and 0 <= padding < entry["shape"][0])
        legal &= type(scale) is float and scale > 0
        if not all_whole(entry, bounds) or not legal or ("pad" in entry and padding is None):
            return "a field is missing or out of range"
        try:
            check_block_size(entry["shape"], cls.d_of(entry))
        except BlockSizeError as error:
            return str(error)
        return None

    @classmethod
    def layout(cls, entry: Entry, dtype: str) -> Specs:
        """codes, codebook, and the pad row if there is one."""
        n, d, k = prod(entry["shape"]), cls.d_of(entry), entry["n_centroids"]
        pad = {"pad": (dtype, (n // entry["shape"][0],))} if "pad" in entry else {}
        codes = "uint8", (packed_bytes(n // d, product.code_bits(k)),)
        codebook: tuple[str, tuple[int, ...]] = ("int8" if "scale" in entry else dtype, (k, d))
        if (bits := _bits_of(entry)) < 8:
            codebook = "uint8", (packed_bytes(k * d, bits),)
        return {"codes": codes, "codebook": codebook, **pad}

    def encode(self, w: Tensor, site: Site, dtype: torch.dtype) -> tuple[Entry, dict[str, Tensor]]:
        """Packed codes, and the codebook in `dtype`, int8 or packed."""
        entry, codebook = self.entry(w, site, dtype, learned=True), self.codebook(w, site)
        codes = pack(site.buffer("codes"), product.code_bits(entry["n_centroids"]))
        if (bits := self.codebook_bits) < FLOAT:
            stored, _ = product.to_integers(codebook, bits)
            stored = stored if bits == 8 else pack(product.digits_of(stored, bits), bits)
        else:
            stored, _ = narrowed(codebook, dtype)
        pad = {"pad": narrowed(w[site.padding_idx], dtype)[0]} if "pad" in entry else {}
        return entry, {"codes": codes, "codebook": stored, **pad}

    @classmethod
    def decode(cls, entry: Entry, parts: Mapping[str, Tensor]) -> StoredProduct:
        """Codes below K, and a codebook in fp32."""
        k, shape, scale, d = entry["n_centroids"], tuple(entry["shape"]), entry.get("scale"), cls.d_of(entry)
        codebook, bits = parts["codebook"], _bits_of(entry)
        if bits < 8:
            codebook = product.integers_of(unpack(codebook, bits, k * d), bits).view(k, d)
        if scale is None:
            codebook = widened(codebook, entry["exponent"])
        elif (least := int(codebook.min())) < -(most := product.most(bits)):
            raise FormatError(
                f"expected a codebook of -{most} to {most}, found {least}; the file is damaged, fetch again"
            )
        else:
            codebook = product.of_integers(codebook, torch.tensor([scale]))
        pad_row = widened(parts["pad"], entry["pad"]) if "pad" in entry else None
        if not all(bool(torch.isfinite(t).all()) for t in (codebook, pad_row) if t is not None):
            raise FormatError("expected finite weights, found NaN or Inf; save another checkpoint")
        codes = unpack(parts["codes"], product.code_bits(k), prod(shape) // d)
        largest = int(codes.max()) if codes.numel() else 0
        if largest >= k:
            raise FormatError(
                f"expected codes below {k}, found {largest}; the file is damaged, fetch it again"
            )
        codes = codes.to(product.codes_dtype(k)).reshape(shape[0], -1)
        return StoredProduct(shape, codes, codebook, entry["padding_idx"], pad_row, scale)

    @classmethod
    def codebook_label(cls, entry: Entry) -> str:
        """K256, K256 int8."""
        return f"K{entry['n_centroids']}" + f" int{_bits_of(entry)}" * ("scale" in entry)

    def finite(self, w: Tensor, site: Site) -> bool:
        """The codebook and the pad row."""
        stored = (self.codebook(w, site, self.codebook_bits), _pad_row(w, site))
        return all(bool(torch.isfinite(t).all()) for t in stored if t is not None)

    def _n_codewords(self, shape: Sequence[int], padding_idx: int | None) -> int:
        return product.n_codewords(shape, self.d(shape), self.n_centroids, padding_idx)


def _pad_row(w: Tensor, site: Site) -> Tensor | None:
    """The pad row, unless it is zero."""
    row = None if site.padding_idx is None else w[site.padding_idx]
    return row if row is not None and bool(row.any()) else None


def _bits_of(entry: Entry) -> int:
    """Of an element of the codebook: 8 are not named, nor is floating point."""
    bits: int = entry.get("codebook_bits", 8 if "scale" in entry else FLOAT)
    return bits
