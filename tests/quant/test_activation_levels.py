"""Rounding of inputs: near, bounded, zero exact, whatever comes; and as torch's own quantisers do it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.quantization import MovingAverageMinMaxObserver

from fairseq_qn.quant.activations import rounded, span

floats = st.floats(-(2.0**120), 2.0**120, width=32)
tokens = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(floats, min_size=n, max_size=n), min_size=1, max_size=4)
)
each_bits = st.integers(2, 8)


@given(tokens, each_bits)
def test_each_token_lies_within_a_step_of_its_levels(values: list[list[float]], bits: int) -> None:
    x = torch.tensor(values)
    low, high = span(x, 1)
    found = rounded(x, low, high, bits)
    step = (high.clamp(min=0).double() - low.clamp(max=0).double()) / (2**bits - 1)
    assert ((found.double() - x.double()).abs() <= step * (1 + 1e-5) + 1e-37).all()
    assert not found[x == 0].any()
    for row, whole in zip(x, found):
        assert len(whole.unique()) <= 2**bits
        assert torch.equal(rounded(row[None], *span(row[None], 1), bits)[0], whole), "by itself"


@pytest.mark.parametrize("outlier", [1e3, -1e3, 1e30, float("inf"), float("nan")])
def test_an_outlier_costs_its_token_alone(outlier: float) -> None:
    x = torch.randn(4, 16, generator=torch.manual_seed(0))
    spoilt = x.index_put((torch.tensor(1), torch.tensor(3)), torch.tensor(outlier))
    found, plain = (rounded(t, *span(t, 1), 8) for t in (spoilt, x))
    kept = torch.tensor([0, 2, 3])
    assert torch.equal(found[kept], plain[kept])
    finite = abs(outlier) < 1e31
    assert found[1].isfinite().all() if finite else found[1].isnan().all(), "nothing hides a NaN"


def test_numbers_past_a_range_become_its_ends_and_nan_stays() -> None:
    low, high = torch.tensor(-1.0), torch.tensor(3.0)
    x = torch.tensor([-float("inf"), -9.0, 9.0, 1e38, float("inf"), float("nan")])
    found = rounded(x, low, high, 8)
    assert found[0] == found[1] and found[2] == found[3] == found[4]
    torch.testing.assert_close(found[[0, 4]], torch.tensor([-1.0, 3.0]), rtol=0, atol=4 / 255 / 2 + 1e-6)
    assert found[5].isnan()
    for zero in (torch.zeros(3), torch.zeros(0)):
        assert torch.equal(rounded(zero, low, high, 8), zero)
    none = torch.tensor(0.0)
    found = rounded(torch.tensor([-5.0, 0.0, 1e30]), none, none, 8)
    assert found.abs().max() < 1e-30, "a range of nothing but 0"


@given(st.floats(-(2.0**100), 2.0**100, width=32), each_bits)
def test_a_constant_is_exact(value: float, bits: int) -> None:
    x = torch.full((2, 3), value)
    torch.testing.assert_close(rounded(x, *span(x, 1), bits), x, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_rounded_in_fp32_at_least(dtype: torch.dtype) -> None:
    x = (300 * torch.randn(5, 7, generator=torch.manual_seed(0))).to(dtype)
    found = rounded(x, *span(x, 1), 8)
    assert found.dtype == dtype and span(x, 1)[0].dtype in (torch.float32, torch.float64)
    assert (
        torch.equal(found, rounded(x.double(), *span(x.float(), 1), 8).to(dtype)) or dtype == torch.float64
    )
    assert torch.equal(x.float().argmax(1), found.float().argmax(1))


def test_images_have_a_range_each() -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.manual_seed(0))
    low, high = span(x, 3)
    assert low.shape == (2, 1, 1, 1) and torch.equal(high.flatten(), x.flatten(1).amax(1))
    assert span(x[0, 0, 0], 3)[0].shape == (1,), "no more dimensions than there are"


def ties(x: Tensor, scale: float) -> Tensor:
    """Where a product with 1 / scale, which torch takes, may round to another side than x / scale."""
    return ((x / scale).frac().abs() - 0.5).abs() < 1e-3


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shift", [0.0, -1.5, 4.0])
def test_as_torch_fake_quantises(bits: int, shift: float) -> None:
    """The observer's scale and zero, and values and gradients by the kernels that know nothing of ours."""
    x = torch.randn(64, 32, generator=torch.manual_seed(0)) + shift
    observer = MovingAverageMinMaxObserver(
        averaging_constant=1.0, quant_min=0, quant_max=2**bits - 1, dtype=torch.quint8
    )
    observer(x / 2)
    scale, zero = (t.item() for t in observer.calculate_qparams())
    theirs, ours = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = torch.fake_quantize_per_tensor_affine(theirs, scale, int(zero), 0, 2**bits - 1)
    found = rounded(ours, observer.min_val, observer.max_val, bits)
    same = ~ties(x, scale)
    torch.testing.assert_close(found[same], expected[same], rtol=1e-5, atol=1e-6)
    for y in (found, expected):
        (y * torch.arange(32.0)).sum().backward()
    # past an end by less than half a step, torch still lets the gradient through
    low, high = observer.min_val.clamp(max=0), observer.max_val.clamp(min=0)
    near = ((x - low).abs() <= scale) | ((x - high).abs() <= scale)
    assert torch.equal(ours.grad[~near], theirs.grad[~near])
    assert (ours.grad == 0).any() and (ours.grad != 0).any()


def test_as_torch_fake_quantises_by_token() -> None:
    x = torch.randn(64, 32, generator=torch.manual_seed(0)) - 0.3
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    scale = (high - low) / 255
    zero = (-low / scale).round().int()
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, 0, 255)
    same = ~ties(x, scale[:, None])
    torch.testing.assert_close(rounded(x, *span(x, 1), 8)[same], expected[same], rtol=1e-5, atol=1e-6)


def test_a_mask_says_what_is_rounded_and_every_value_learns() -> None:
    x = torch.randn(8, 8, generator=torch.manual_seed(0), requires_grad=True)
    mask = torch.rand(8, 8, generator=torch.manual_seed(1)) < 0.5
    low, high = torch.tensor(-0.5), torch.tensor(0.5)
    found, plain = rounded(x, low, high, 4, mask), rounded(x.detach(), low, high, 4)
    assert torch.equal(found, torch.where(mask, plain, x)), "to the bit what evaluation computes"
    found.sum().backward()
    assert torch.equal(x.grad, (~mask | (x.abs() <= 0.5)).float())
    by_sample = torch.func.vmap(torch.func.grad(lambda row: rounded(row, low, high, 4).sum()))(x.detach())
    assert torch.equal(by_sample, (x.abs() <= 0.5).float()), "under torch.func's transforms too"
