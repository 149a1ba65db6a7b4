"""The compiled de-quantisation against the plain torch code that defines it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_qn.kernels import dequantize as kernel
from fairseq_qn.kernels import native
from fairseq_qn.quant.integer import Integers, dequantize

needs_kernel = pytest.mark.skipif(native.library() is None, reason="the kernel was not compiled at installation")


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 300), st.sampled_from([1, 3, 16, 64, 1000, 20_000]), st.floats(1e-38, 1e36))
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
    integers = Integers(torch.arange(40, dtype=torch.uint8).view(4, 10), torch.rand(4), torch.arange(4, dtype=torch.uint8))
    compiled = dequantize(integers, (8, 5))
    assert kernel.usable(integers.levels, integers.scale) and not kernel.usable(integers.levels, integers.scale.half())
    monkeypatch.setattr(native, "library", lambda: None)
    assert not kernel.usable(integers.levels, integers.scale)
    assert torch.equal(dequantize(integers, (8, 5)), compiled)
