"""A weight <-> the tensors that stand for it in the file. The layout is declared before any data exist.

    product   <name>/codes     uint8 [ceil(n_blocks * bits / 8)]    packed at ceil(log2 K) bits
              <name>/codebook  fp16 or fp32 [K, d], times 2^exponent
              <name>/pad       fp16 or fp32 [embedding_dim], times 2^pad: the pad row, unless it is zero
    integer   <name>/levels    uint8 [ceil(n * bits / 8)]           packed at `bits` bits
              <name>/scale     fp32 [n_ranges]
              <name>/zero      uint8 [n_ranges]
    dense     <name>           Parameters: fp16 or fp32, times 2^exponent; buffers: fp32,
    fp64 as it is; what is not
                               floating point as it is

exponent is 0 unless fp16 would overflow or lose small values; then the values are shifted by a power of two,
exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import frexp, isfinite, prod
from typing import Any

import torch
from torch import Tensor

from fairseq_qn.errors import FormatError
from fairseq_qn.quant.bitpack import pack, packed_bytes, unpack
from fairseq_qn.quant.integer import Integers, ranges_shape
from fairseq_qn.quant.product import code_bits, codes_dtype

Entry = dict[str, Any]
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
FLOATS = {"float16": torch.float16, "float32": torch.float32}


def product_entry(
    shape: Sequence[int], block_size: int, n_centroids: int, padding_idx: int | None, pad: bool = False
) -> Entry:
    """The manifest's record of a product-quantised weight; n_centroids as clipped; pad: whether its pad row
    is stored.
    """
    return {
        "scheme": "product", "shape": list(shape), "block_size": block_size, "n_centroids": n_centroids,
        "padding_idx": padding_idx, "exponent": 0, **({"pad": 0} if pad else {}),
    }  # fmt: skip


def integer_entry(shape: Sequence[int], bits: int, granularity: str, group_size: int) -> Entry:
    """The manifest's record of an integer-quantised weight."""
    return {
        "scheme": "integer",
        "shape": list(shape),
        "bits": bits,
        "granularity": granularity,
        "group_size": group_size,
    }


def layout(entry: Entry, dtype: torch.dtype) -> Specs:
    """part -> (dtype, shape) of the tensors that stand for a weight, with floating-point parts in
    `dtype`.
    """
    n = prod(entry["shape"])
    if entry["scheme"] == "product":
        d, k = entry["block_size"], entry["n_centroids"]
        pad = {"pad": (dtype, (n // entry["shape"][0],))} if "pad" in entry else {}
        return {
            "codes": (torch.uint8, (packed_bytes(n // d, code_bits(k)),)),
            "codebook": (dtype, (k, d)),
            **pad,
        }
    ranges, _ = ranges_shape(entry["shape"], entry["granularity"], entry["group_size"])
    return {
        "levels": (torch.uint8, (packed_bytes(n, entry["bits"]),)),
        "scale": (torch.float32, (ranges,)),
        "zero": (torch.uint8, (ranges,)),
    }


def encode_product(
    entry: Entry, codes: Tensor, codebook: Tensor, dtype: torch.dtype, pad: Tensor | None = None
) -> dict[str, Tensor]:
    """Parts of a product-quantised weight; sets entry["exponent"], and entry["pad"] where the entry has
    it.
    """
    narrow, entry["exponent"] = narrowed(codebook, dtype)
    parts = {"codes": pack(codes, code_bits(entry["n_centroids"])), "codebook": narrow}
    if "pad" in entry:
        parts["pad"], entry["pad"] = narrowed(pad, dtype)
    return parts


def encode_integer(entry: Entry, integers: Integers) -> dict[str, Tensor]:
    """Parts of an integer-quantised weight."""
    return {"levels": pack(integers.levels, entry["bits"]), "scale": integers.scale, "zero": integers.zero}


def decode_product(entry: Entry, parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(codes [out_features, blocks a row], codebook fp32 [K, d]). Raises FormatError for a code beyond K."""
    k, shape = entry["n_centroids"], entry["shape"]
    codes = unpack(parts["codes"], code_bits(k), prod(shape) // entry["block_size"])
    largest = int(codes.max()) if codes.numel() else 0
    if largest >= k:
        raise FormatError(f"expected codes below {k}, found {largest}; the file is damaged, fetch it again")
    return codes.to(codes_dtype(k)).reshape(shape[0], -1), widened(parts["codebook"], entry["exponent"])


def decode_integer(entry: Entry, parts: Mapping[str, Tensor]) -> Integers:
    """The integers of a weight."""
    rows, columns = ranges_shape(entry["shape"], entry["granularity"], entry["group_size"])
    levels = unpack(parts["levels"], entry["bits"], rows * columns).reshape(rows, columns)
    return Integers(levels, parts["scale"], parts["zero"])


def all_finite(entry: Entry, parts: Mapping[str, Tensor]) -> bool:
    """Whether every weight that the parts stand for is finite: each codeword, or both ends of each range."""
    if entry["scheme"] == "product":
        return bool(torch.isfinite(widened(parts["codebook"], entry["exponent"])).all())
    zero = parts["zero"].float()
    ends = torch.stack([-zero, 2.0 ** entry["bits"] - 1 - zero]) * parts["scale"].float()
    return bool(torch.isfinite(ends).all())


def narrowed(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """(values / 2^exponent in `dtype`, exponent); what is not floating point unchanged."""
    exponent = exponent_of(values, dtype)
    if exponent:
        values = torch.ldexp(values.detach().float(), torch.tensor(-exponent))
    return (values.to(dtype) if values.is_floating_point() else values), exponent


def exponent_of(values: Tensor, dtype: torch.dtype) -> int:
    """The power of two that `narrowed` takes out: 0 unless `dtype` is fp16 and would overflow or lose small
    values.
    """
    if not values.is_floating_point() or dtype != torch.float16 or not values.numel():
        return 0
    largest = float(values.detach().abs().max())
    if largest == 0.0 or 2.0**-6 <= largest < 2.0**15 or not isfinite(largest):
        return 0
    return max(-120, min(120, frexp(largest)[1]))  # 2^120 is the most that fp32 scales by


def widened(values: Tensor, exponent: int) -> Tensor:
    """fp32 values of a narrowed tensor; what is not floating point, or fp64, unchanged."""
    if not values.is_floating_point() or values.dtype == torch.float64:
        return values
    return torch.ldexp(values.float(), torch.tensor(exponent)) if exponent else values.float()
