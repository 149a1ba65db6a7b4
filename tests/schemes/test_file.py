"""What a scheme writes: its declared layout, exact codes, and refusal of what means nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, isfinite, prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import hostile, weights, weights_and_block_sizes
from torch import Tensor

from fairseq_qn.artifact.container import spec_of
from fairseq_qn.artifact.manifest import version_of
from fairseq_qn.errors import FormatError, RecipeError
from fairseq_qn.quant import product
from fairseq_qn.quant.half import FLOATS, widened
from fairseq_qn.quant.integer import fake_quantize
from fairseq_qn.schemes.integer import Integer
from fairseq_qn.schemes.product import Product


@dataclass
class Place:
    """A site by hand: a weight with these buffers."""

    shape: tuple[int, ...]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    padding_idx: int | None = None
    name: str = "w"
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def buffer(self, name: str) -> Tensor:
        return self.buffers[name]

    def parameter(self, name: str) -> Tensor:
        return self.parameters[name]

    def derived(self, name: str, compute: Any) -> Any:
        return compute(self.buffers[name])


def checked(scheme: Product | Integer, w: Tensor, site: Place, dtype: torch.dtype) -> tuple[dict, dict]:
    """What `encode` gives, if it is as `entry`, `layout` and `check_entry` say."""
    entry, parts = scheme.encode(w, site, dtype)
    assert entry == scheme.entry(w, site, dtype, learned=True) and scheme.check_entry(entry) is None
    found = {n: spec_of(t.dtype, t.shape) for n, t in parts.items()}
    assert found == scheme.layout(entry, str(dtype).removeprefix("torch."))
    return entry, parts


@given(
    weights_and_block_sizes(),
    st.sampled_from([1, 2, 3, 5, 8, 100, 257]),
    st.sampled_from([getattr(torch, name) for name in FLOATS]),
    st.integers(0, 999),
)
def test_product_round_trip(case: tuple[Tensor, int], k: int, dtype: torch.dtype, seed: int) -> None:
    w, d = case[0].float(), case[1]
    scheme = Product(d, k)
    k = product.n_codewords(w.shape, d, k)
    rows, columns = product.codes_shape(w.shape, d)
    codes = torch.randint(0, k, (rows, columns), generator=torch.Generator().manual_seed(seed))
    site = Place(tuple(w.shape), {"codes": codes.to(product.codes_dtype(k))})
    entry, parts = checked(scheme, w, site, dtype)
    # exactly log2 K bits, rounded up
    assert parts["codes"].numel() == -(-rows * columns * max(1, (k - 1).bit_length()) // 8)
    found, book = scheme.decode(entry, parts), scheme.codebook(w, site)
    assert (
        torch.equal(found.codes, site.buffers["codes"]) and found.codes.dtype == site.buffers["codes"].dtype
    )
    assert found.codebook.dtype == torch.float32 and found.shape == site.shape
    if dtype == torch.float32:
        assert torch.equal(found.codebook, book) and entry["exponent"] == 0
        torch.testing.assert_close(found.dense(), scheme.quantized(w, site))
    else:
        largest = float(book.abs().max())
        torch.testing.assert_close(found.codebook, book, rtol=1e-3, atol=largest * 2**-18)


@given(
    weights_and_block_sizes(),
    st.sampled_from([1, 3, 257]),
    st.sampled_from([1.0, 2.0**-140, 2.0**90]),
    st.sampled_from([getattr(torch, name) for name in FLOATS]),
    st.booleans(),
)
def test_int8_codebooks_are_read_as_they_are_stored(
    case: tuple[Tensor, int], k: int, factor: float, dtype: torch.dtype, padded: bool
) -> None:
    """To the bit, in floating-point parts of any dtype; the pad row, which has none, is zero."""
    w, d = case[0].float() * factor, case[1]
    scheme, pad = Product(d, k, 8), 0 if padded else None
    if padded:
        w[0] = 0
    k = product.n_codewords(w.shape, d, k, pad)
    codes = torch.arange(w.numel() // d).remainder(k).reshape(len(w), -1).to(product.codes_dtype(k))
    site = Place(tuple(w.shape), {"codes": codes}, pad)
    entry, parts = checked(scheme, w, site, dtype)
    assert "exponent" not in entry and scheme.finite(w, site)
    found, read = scheme.decode(entry, parts), scheme.quantized(w, site)
    assert torch.equal(found.dense(), read)
    assert torch.equal(scheme.frozen(w, site), read)
    book, scale = scheme.codebook(w, site), entry["scale"]
    tiny = 127 * torch.finfo(torch.float32).tiny  # below, an end lies farther out than the largest
    assert int(parts["codebook"].int().abs().max()) == 127 or float(book.abs().max()) < tiny
    torch.testing.assert_close(found.codebook, book, rtol=1e-6, atol=scale / 2 * (1 + 1e-5))
    levels, sizes = found.signed() or (torch.zeros(0), torch.zeros(0))
    assert torch.equal(levels.float() * sizes, read) and levels.dtype == torch.int8


@given(
    weights(st.tuples(st.integers(1, 6), st.integers(1, 5).map(lambda n: 3 * n))),
    st.integers(2, 8),
    st.sampled_from(["tensor", "channel", "group"]),
)
def test_integer_round_trip_is_exact(w: Tensor, bits: int, granularity: str) -> None:
    scheme = Integer(bits, granularity, 3)
    entry, parts = checked(scheme, w, Place(tuple(w.shape)), torch.float16)
    assert parts["levels"].numel() == -(-w.numel() * bits // 8)
    assert torch.equal(scheme.decode(entry, parts).dense(), fake_quantize(w, bits, granularity, 3))


KINDS = [
    (1, "least_squares"),
    ("ternary", "least_squares"),
    (4, "learned"),
    (1, "learned"),
    ("ternary", "learned"),
]
KINDS += [
    (bits, ranges) for bits in (2, 3, 8) for ranges in ("minmax", "percentile", "histogram", "least_squares")
]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize(("bits", "ranges"), KINDS)
@given(weights(st.tuples(st.integers(1, 6), st.integers(1, 5).map(lambda n: 3 * n))), st.booleans())
@settings(max_examples=15)
def test_every_width_and_range_round_trips_exactly(
    granularity: str, bits: int | str, ranges: str, w: Tensor, symmetric: bool
) -> None:
    lines = {"bits": bits, "granularity": granularity, "group_size": 3, "ranges": ranges}
    few = bits in (1, "ternary") or ranges == "learned"
    scheme = Integer.parse(lines if few else {**lines, "symmetric": symmetric}, "rule")
    assert scheme.symmetric is (few or symmetric)
    learned = {n: t + 1e-3 for n, t in scheme.parameters(w.shape).items()}
    site = Place(tuple(w.shape), scheme.buffers(w.shape, None), parameters=learned)
    site.buffers |= {} if site.buffers else {"none": torch.zeros(0)}
    assert scheme.learn(w, site, False, 1, 0) >= 0
    assert scheme.misfit(site.buffers, site) is None
    entry, parts = checked(scheme, w, site, torch.float16)
    width = Fraction(8, 5) if bits == "ternary" else bits
    digits = -(-w.numel() // 5) * 5 if bits == "ternary" else w.numel()
    assert parts["levels"].numel() == ceil(digits * width / 8) and ("zero" in parts) is not scheme.symmetric
    found = scheme.decode(entry, parts)
    if ranges == "learned":  # the step is the first one and its change
        first = site.buffers["ranges"][0].view(torch.float32)
        torch.testing.assert_close(found.scale, first + 1e-3)
    if bits == 8 and scheme.symmetric:
        whole = found.dense().reshape(found.levels.shape) / found.scale.unsqueeze(1)
        assert (whole[(found.scale > 1e-30)].abs() < 127.5).all() and (found.zero == 127).all()
    assert torch.equal(found.dense(), scheme.quantized(w, site)) and found.levels.dtype == torch.uint8
    levels = {1: 2, "ternary": 3, 8: 255}.get(bits, 2 ** int(bits) if bits != "ternary" else 3)
    assert len(found.levels.unique()) <= (levels if scheme.symmetric or bits != 8 else 256)


def int8_codebook() -> tuple[Product, Tensor, Place]:
    site = Place((2, 4), {"codes": torch.tensor([[0, 1], [0, 0]], dtype=torch.uint8)})
    return Product(2, 2, 8), torch.tensor([[1.0, -2, 0.25, 0.5], [1, -2, 1, -2]]), site


def test_the_int8_codebook_of_a_file() -> None:
    """One byte a number, in a file of version 3."""
    scheme, w, site = int8_codebook()
    entry, parts = checked(scheme, w, site, torch.float16)
    assert parts["codebook"].tolist() == [[64, -127], [16, 32]]
    assert entry["scale"] == float(torch.tensor(2.0) / 127)
    assert version_of({"layers": {"w": entry}}) == 3
    plain = Product(2, 2).entry(w, site, torch.float16, True)
    assert version_of({"layers": {"w": plain}}) == 2 and "scale" not in plain


@pytest.mark.parametrize("scale", [0.0, -0.1, float("nan"), 1, "1", None, True])
def test_scales_that_are_none(scale: Any) -> None:
    scheme, w, site = int8_codebook()
    entry = scheme.entry(w, site, torch.float16, True)
    assert scheme.check_entry(entry) is None
    assert scheme.check_entry(entry | {"scale": scale}) == "a field is missing or out of range"


def test_int8_codebooks_beyond_their_range_are_refused() -> None:
    scheme, w, site = int8_codebook()
    entry, parts = scheme.encode(w, site, torch.float16)
    for scale in (1e37, 1e300):
        with pytest.raises(FormatError, match="^expected finite weights, found NaN or Inf"):
            scheme.decode(entry | {"scale": scale}, parts)
    parts["codebook"][0, 1] = -128
    with pytest.raises(FormatError, match="^expected a codebook of -127 to 127, found -128;"):
        scheme.decode(entry, parts)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4028234663852886e38])
def test_what_int8_codebooks_cannot_hold_is_seen_before_it_is_written(value: float) -> None:
    """The largest fp32 number times 127 / 127 overflows."""
    scheme, w, site = int8_codebook()
    w[0, 2:] = value
    overflows = not bool(torch.isfinite(product.scale_of(w, 8) * 127).all())
    assert scheme.finite(w, site) is not overflows and (overflows or value > 1e38)
    assert bool(torch.isfinite(scheme.quantized(w, site)).all()) is not overflows
    assert isfinite(scheme.entry(w, site, torch.float16, True)["scale"])


def test_old_entries_stay_and_new_ones_say_so() -> None:
    w, site = torch.randn(2, 6), Place((2, 6))
    assert Integer(4).entry(w, site, torch.float16, True) == {
        "scheme": "integer", "shape": [2, 6], "bits": 4, "granularity": "channel", "group_size": 64,
    }  # fmt: skip
    for scheme in (Integer(4, symmetric=True), Integer.parse({"bits": 1}, "")):
        content = {"layers": {"w": scheme.entry(w, site, torch.float16, True)}}
        assert version_of(content) == 3
        assert Integer.check_entry({**content["layers"]["w"], "symmetric": 1}) is not None
    assert Integer.check_entry(Integer(4).entry(w, site, torch.float16, True) | {"bits": 1}) is not None


@pytest.mark.parametrize("bits", [8, "ternary"])
def test_levels_beyond_the_grid_are_refused(bits: int | str) -> None:
    w, site = torch.randn(2, 6), Place((2, 6))
    scheme = Integer(bits, symmetric=True, ranges="minmax" if bits == 8 else "least_squares")
    if bits != 8:
        site.buffers = scheme.buffers(w.shape, None)
        scheme.learn(w, site, False, 1, 0)
    entry, parts = scheme.encode(w, site, torch.float16)
    parts["levels"][0] = 255
    with pytest.raises(FormatError, match="expected levels up to 254, found 255|expected bytes below 243"):
        scheme.decode(entry, parts)


def test_ranges_of_a_checkpoint_that_mean_nothing() -> None:
    scheme = Integer(4, ranges="percentile")
    site = Place((3, 8), scheme.buffers((3, 8), None))
    scheme.learn(torch.randn(3, 8), site, False, 1, 0)
    good = site.buffers["ranges"]
    for place, value in (((0, 1), 0), ((0, 1), -1), ((0, 2), 0x7F800000), ((1, 0), 16), ((1, 0), -1)):
        bad = good.clone()
        bad[place] = value
        assert "positive scales" in (scheme.misfit({"ranges": bad}, site) or "")
    assert "expected ranges int32 [2, 3]" in (scheme.misfit({"ranges": good[0]}, site) or "")
    assert "expected ranges int32 [2, 3]" in (scheme.misfit({"ranges": good.to(torch.uint8)}, site) or "")


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ({"bits": 1, "ranges": "minmax"}, r"ranges: expected one of \['least_squares', 'learned'\]"),
        ({"bits": "ternary", "symmetric": False}, "symmetric: expected true of ternary bits, found false"),
        (
            {"ranges": "learned", "symmetric": False},
            "symmetric: expected true of learned steps, found false",
        ),
        ({"bits": 9}, "bits: expected a whole number from 1 to 8 or ternary, found 9"),
    ],
)
def test_lines_that_do_not_go_together(lines: dict[str, Any], match: str) -> None:
    with pytest.raises(RecipeError, match=f"^rule.{match}"):
        Integer.parse(lines, "rule")


@pytest.mark.parametrize(("k", "code"), [(200, 200), (200, 255), (3, 3), (257, 300), (5, 7)])
def test_codes_beyond_the_codebook(k: int, code: int) -> None:
    columns = 3 * max(2, -(-k // 4))
    w, codes = hostile("normal", (4, columns), 0), torch.arange(4 * columns // 3).remainder(k).int()
    codes = codes.reshape(4, -1)
    site = Place((4, columns), {"codes": codes.to(product.codes_dtype(k))})
    scheme = Product(3, k)
    entry, parts = scheme.encode(w, site, torch.float16)
    other = codes.clone()
    other[3, 1] = code
    parts["codes"] = product_pack(other, k)
    with pytest.raises(FormatError, match=f"^expected codes below {k}, found {code}; the file is damaged"):
        scheme.decode(entry, parts)


def product_pack(codes: Tensor, k: int) -> Tensor:
    bits = product.code_bits(k)
    stream = [(int(code) >> bit) & 1 for code in codes.flatten() for bit in range(bits)]
    stream += [0] * (-len(stream) % 8)
    octets = (stream[i : i + 8] for i in range(0, len(stream), 8))
    return torch.tensor(
        [sum(bit << j for j, bit in enumerate(octet)) for octet in octets], dtype=torch.uint8
    )


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_a_pad_row_has_a_scale_of_its_own(scale: float) -> None:
    w = torch.tensor([[0.5, -1, 2, 3], [0, 0, 0, 0]])
    w[1] = torch.randn(4) * scale
    site = Place((2, 4), {"codes": torch.tensor([[0, 1], [0, 0]], dtype=torch.uint8)}, padding_idx=1)
    entry, parts = checked(Product(2, 2), w, site, torch.float16)
    assert torch.equal(Product.decode(entry, parts).codebook, torch.tensor([[0.5, -1], [2, 3]]))
    torch.testing.assert_close(widened(parts["pad"], entry["pad"]), w[1], rtol=1e-3, atol=scale * 1e-5)


@pytest.mark.parametrize("part", ["codebook", "pad", "scale"])
def test_not_a_number_is_refused(part: str) -> None:
    scheme = Integer(4) if part == "scale" else Product(2, 2)
    codes = torch.tensor([[0, 1], [0, 0]], dtype=torch.uint8)
    site = Place((2, 4), {"codes": codes}, padding_idx=1)
    w = torch.ones(2, 4)
    entry, parts = scheme.encode(w.clone(), site, torch.float32)
    parts[part].view(-1)[prod(parts[part].shape) - 1] = float("nan")
    assert scheme.finite(w, site)
    with pytest.raises(FormatError, match="^expected finite weights, found NaN or Inf"):
        scheme.decode(entry, parts)
    w[1 if part == "pad" else 0, 2] = float("inf")
    assert not scheme.finite(w, site)
