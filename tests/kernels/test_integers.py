"""The compiled steps of integer quantisation against the plain torch code that defines them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import hostile

from fairseq_qn.kernels import integers as kernel
from fairseq_qn.kernels import native
from fairseq_qn.quant.integer import Integers, dequantize, fake_quantize, fake_quantize_some
from fairseq_qn.quant.noise import bernoulli

needs_kernel = pytest.mark.skipif(
    native.library() is None, reason="the kernel was not compiled at installation"
)


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 300),
    st.sampled_from([1, 3, 16, 64, 1000, 20_000]),
    st.floats(1e-38, 1e36),
)
def test_every_bit_is_that_of_torch(seed: int, ranges: int, size: int, largest: float) -> None:
    ranges = min(ranges, 60_000 // size)
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (ranges, size), generator=generator, dtype=torch.uint8)
    zero = torch.randint(0, 256, (ranges,), generator=generator, dtype=torch.uint8)
    scale = torch.rand(ranges, generator=generator) * largest
    expected = (levels.float() - zero.float().unsqueeze(1)) * scale.unsqueeze(1)
    assert torch.equal(kernel.dequantize(levels, scale, zero), expected)
    out = torch.full((ranges * size,), float("nan"))
    found = kernel.dequantize(levels, scale, zero, out)
    assert torch.equal(found, expected) and found.data_ptr() == out.data_ptr()


@needs_kernel
def test_integers_go_through_it_and_need_not(monkeypatch: pytest.MonkeyPatch) -> None:
    integers = Integers(
        torch.arange(40, dtype=torch.uint8).view(4, 10), torch.rand(4), torch.arange(4, dtype=torch.uint8)
    )
    compiled = dequantize(integers, (8, 5))
    assert kernel.usable(integers.levels, integers.scale) and not kernel.usable(
        integers.levels, integers.scale.half()
    )
    monkeypatch.setattr(native, "library", lambda: None)
    assert not kernel.usable(integers.levels, integers.scale)
    assert torch.equal(dequantize(integers, (8, 5)), compiled)


@needs_kernel
@pytest.mark.parametrize("kind", ["normal", "constant", "zero", "one_signed", "huge", "tiny", "inf", "nan"])
@pytest.mark.parametrize(
    ("granularity", "shape"), [("tensor", (70, 96)), ("channel", (70, 96)), ("group", (700, 96))]
)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_noise_is_that_of_torch_to_the_bit(
    bits: int, granularity: str, shape: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = hostile(kind, shape, 0) if kind not in ("inf", "nan") else hostile("normal", shape, 0)
    if kind in ("inf", "nan"):
        weight[3, 5] = float(kind)
    mask = bernoulli(weight.numel(), 0.3, 1)
    before, parts = weight.clone(), mask.split(20_000)  # a part may end anywhere in a range
    found = fake_quantize_some(weight, parts, bits, granularity, 32)
    monkeypatch.setattr(native, "library", lambda: None)
    plain = fake_quantize_some(weight, parts, bits, granularity, 32)
    expected = torch.where(mask.view(shape), fake_quantize(weight, bits, granularity, 32), weight)
    torch.testing.assert_close(found, plain, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found.isnan(), plain.isnan())
    torch.testing.assert_close(weight, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_in_other_dtypes(dtype: torch.dtype) -> None:
    weight = hostile("normal", (9, 8), 0).to(dtype)
    mask = bernoulli(72, 0.5, 1)
    found = fake_quantize_some(weight, [mask[:30], mask[30:]], 4)
    assert found.dtype == dtype
    expected = torch.where(mask.view(9, 8), fake_quantize(weight, 4), weight.float().to(dtype))
    assert torch.equal(found, expected)
