"""A weight's tensors in the file: their declared layout, exact codes, and fp16 that neither overflows nor
vanishes.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, hostile, weights, weights_and_block_sizes
from torch import Tensor

from fairseq_qn.artifact import codec
from fairseq_qn.errors import FormatError
from fairseq_qn.quant import integer, product

FLOATS = st.sampled_from(list(codec.FLOATS.values()))


def check_layout(entry: codec.Entry, parts: dict[str, Tensor], dtype: torch.dtype) -> None:
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == codec.layout(
        entry, dtype
    )


@given(weights_and_block_sizes(), st.sampled_from([1, 2, 3, 5, 8, 100, 257]), FLOATS, st.integers(0, 999))
def test_product_round_trip(case: tuple[Tensor, int], k: int, dtype: torch.dtype, seed: int) -> None:
    weight, d = case
    rows, columns = product.codes_shape(weight.shape, d)
    codes = torch.randint(0, k, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(
        product.codes_dtype(k)
    )
    codebook = hostile("mixed", (k, d), seed)
    entry = codec.product_entry(weight.shape, d, k, None)
    parts = codec.encode_product(entry, codes, codebook, dtype)
    check_layout(entry, parts, dtype)
    assert parts["codes"].numel() == -(
        -rows * columns * max(1, (k - 1).bit_length()) // 8
    )  # exactly log2 K bits, rounded up
    found, book = codec.decode_product(entry, parts)
    assert torch.equal(found, codes) and found.dtype == codes.dtype and book.dtype == torch.float32
    if dtype == torch.float32:
        assert torch.equal(book, codebook) and entry["exponent"] == 0
    else:
        torch.testing.assert_close(book, codebook, rtol=1e-3, atol=float(codebook.abs().max()) * 2**-18)


@given(
    weights(st.tuples(st.integers(1, 6), st.integers(1, 5).map(lambda n: 3 * n))),
    st.integers(2, 8),
    st.sampled_from(["tensor", "channel", "group"]),
)
def test_integer_round_trip_is_exact(weight: Tensor, bits: int, granularity: str) -> None:
    q = integer.quantize(weight, bits, granularity, 3)
    entry = codec.integer_entry(weight.shape, bits, granularity, 3)
    parts = codec.encode_integer(entry, q)
    check_layout(entry, parts, torch.float16)
    assert parts["levels"].numel() == -(-weight.numel() * bits // 8)
    found = codec.decode_integer(entry, parts)
    for part in ("levels", "scale", "zero"):
        assert torch.equal(getattr(found, part), getattr(q, part)), part
    again = integer.dequantize(found, weight.shape)
    assert torch.equal(again, integer.fake_quantize(weight, bits, granularity, 3))


@given(weights(st.just((6, 7)), DTYPES), st.integers(-125, 115))
def test_fp16_parts_keep_three_digits_at_any_scale(values: Tensor, power: int) -> None:
    """Of what is not 2^18 times smaller than the largest."""
    values = values.float()
    largest = float(values.abs().max())
    if largest:
        values = values / largest * 2.0**power
    narrow, exponent = codec.narrowed(values, torch.float16)
    assert narrow.dtype == torch.float16 and torch.isfinite(narrow).all() and isinstance(exponent, int)
    wide = codec.widened(narrow, exponent)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, values, rtol=6e-4, atol=2.0 ** (power - 18))


@pytest.mark.parametrize("value", [0.0, 2.0**-6, 1.0, 1.9, 2.0**15 - 16, -1.0])
def test_an_ordinary_tensor_needs_no_exponent(value: float) -> None:
    assert codec.narrowed(torch.tensor([0.0, value]), torch.float16)[1] == 0


def test_scaling_is_exact() -> None:
    """A power of two: where fp16 holds the mantissa nothing is lost, however far away."""
    for power in (-100, -40, -8, 20, 100):
        values = torch.tensor([1.5, -0.75, 0.0, 1 + 2**-10]) * 2.0**power
        narrow, exponent = codec.narrowed(values, torch.float16)
        assert exponent != 0 and torch.equal(codec.widened(narrow, exponent), values)


def test_what_is_not_floating_point_stays_and_fp32_is_untouched() -> None:
    for values in (torch.tensor([1, 2**40]), torch.tensor([True]), torch.tensor(3, dtype=torch.int32)):
        narrow, exponent = codec.narrowed(values, torch.float16)
        assert (
            torch.equal(codec.widened(narrow, exponent), values)
            and narrow.dtype == values.dtype
            and exponent == 0
        )
    values = torch.tensor([1e-30, 3e38])
    assert torch.equal(codec.narrowed(values, torch.float32)[0], values)
    assert codec.narrowed(values.double(), torch.float32)[0].dtype == torch.float32
    empty = torch.empty(0)
    assert codec.narrowed(empty, torch.float16)[1] == 0


def test_nan_and_inf_are_kept_as_they_are() -> None:
    values = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    narrow, exponent = codec.narrowed(values, torch.float16)
    assert exponent == 0 and torch.equal(codec.widened(narrow, 0).isnan(), values.isnan())


@pytest.mark.parametrize(("k", "code"), [(200, 200), (200, 255), (3, 3), (257, 300), (5, 7)])
def test_codes_beyond_the_codebook(k: int, code: int) -> None:
    entry = codec.product_entry((4, 6), 3, k, None)
    codes = torch.zeros(4, 2, dtype=torch.int32)
    codes[3, 1] = code
    parts = codec.encode_product(entry, codes, torch.zeros(k, 3), torch.float16)
    with pytest.raises(FormatError, match=f"^expected codes below {k}, found {code}; the file is damaged"):
        codec.decode_product(entry, parts)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_a_pad_row_has_a_scale_of_its_own(scale: float) -> None:
    codes, codebook, pad = (
        torch.tensor([[0, 1], [0, 0]]),
        torch.tensor([[0.5, -1], [2, 3]]),
        torch.randn(4) * scale,
    )
    entry = codec.product_entry((2, 4), 2, 2, 1, pad=True)
    parts = codec.encode_product(entry, codes, codebook, torch.float16, pad)
    check_layout(entry, parts, torch.float16)
    assert torch.equal(codec.decode_product(entry, parts)[1], codebook)
    torch.testing.assert_close(codec.widened(parts["pad"], entry["pad"]), pad, rtol=1e-3, atol=scale * 1e-5)


def test_double_is_kept_and_beyond_fp32_is_seen() -> None:
    values = torch.tensor([1 / 3, 1e300], dtype=torch.float64)
    narrow, exponent = codec.narrowed(values, torch.float64)
    assert torch.equal(codec.widened(narrow, exponent), values)
