"""Integers: the right number of levels, exact zero, bounded error, against a numpy reference, on hostile
weights.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import DTYPES, hostile, weights
from torch import Tensor

from fairseq_qn.errors import BlockSizeError, NonFiniteWeight
from fairseq_qn.quant.integer import dequantize, fake_quantize, quantize, ranges_shape

GRANULARITIES = ["tensor", "channel", "group"]
bits = st.integers(2, 8)
granularities = st.sampled_from(GRANULARITIES)
shapes = st.tuples(st.integers(1, 8), st.integers(1, 5).map(lambda n: 4 * n)) | st.tuples(
    st.integers(1, 5), st.just(4), st.just(3), st.just(3)
)


def by_range(x: Tensor, granularity: str, group_size: int = 4) -> Tensor:
    return x.reshape(ranges_shape(x.shape, granularity, group_size))


@given(weights(shapes, DTYPES), bits, granularities)
def test_levels_zero_error_and_order(weight: Tensor, n: int, granularity: str) -> None:
    q = quantize(weight, n, granularity, 4)
    rows, scale = by_range(weight.double(), granularity), q.scale.double().unsqueeze(1)
    assert int(q.levels.max()) < 2**n and q.levels.shape == rows.shape
    found = by_range(dequantize(q, weight.shape).double(), granularity)
    assert all(len(row.unique()) <= 2**n for row in found)
    assert not found[rows == 0].any()  # zero is exact
    assert ((found - rows).abs() <= 0.501 * scale).all()
    order = rows.argsort(1)
    assert (found.gather(1, order).diff(dim=1) >= 0).all()  # monotone
    assert torch.isfinite(found).all()


@given(weights(shapes, DTYPES), bits, granularities)
def test_against_numpy(weight: Tensor, n: int, granularity: str) -> None:
    w = weight.float().numpy().reshape(ranges_shape(weight.shape, granularity, 4))
    found = fake_quantize(weight.float(), n, granularity, 4).numpy().reshape(w.shape)
    for row, result in zip(w, found):
        low, high = np.float32(min(row.min(), 0)), np.float32(max(row.max(), 0))
        top = np.float32(2**n - 1)
        scale = max(high / top - low / top, np.finfo(np.float32).tiny)
        step = scale * np.float32(1 - 2**-20)
        zero = np.clip(np.round(-low / step), 0, top)
        levels = np.clip(np.round(row / step) + zero, 0, top)
        np.testing.assert_allclose(result, (levels - zero) * scale, rtol=1e-6, atol=0)


@given(weights(shapes), bits, granularities)
def test_idempotent(weight: Tensor, n: int, granularity: str) -> None:
    q = quantize(weight, n, granularity, 4)
    assume((q.scale > 1e-37).all())  # of a range that is all but zero nothing is left to repeat
    once = dequantize(q, weight.shape)
    again = quantize(once, n, granularity, 4)
    assert torch.equal(again.levels, q.levels) and torch.equal(again.zero, q.zero)
    torch.testing.assert_close(dequantize(again, weight.shape), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("n", range(2, 9))
def test_every_level_is_there(n: int) -> None:
    """Upstream's four bits are nine levels."""
    values = fake_quantize(torch.linspace(-1, 1, 10_001).reshape(1, -1), n, "tensor").unique()
    assert len(values) == 2**n
    torch.testing.assert_close(values.diff(), torch.full((2**n - 1,), 2 / (2**n - 1)))


def test_one_signed_weights_use_all_levels_between_zero_and_their_end() -> None:
    for sign in (1, -1):
        q = quantize(sign * torch.linspace(0, 3, 1000).reshape(1, -1), 4, "tensor")
        assert q.levels.unique().tolist() == list(range(16)) and q.zero.item() == (0 if sign > 0 else 15)


def test_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.0, 0.4, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 6.0, 1.4, 1.6]])
    q = quantize(weight, 2, "channel")  # scales 1, tiny, 2; zeros 1, 0, 0
    assert q.levels.tolist() == [[0, 1, 1, 3], [0, 0, 0, 0], [2, 3, 1, 1]] and q.zero.tolist() == [1, 0, 0]
    assert dequantize(q, (3, 4)).tolist() == [[-1, 0, 0, 2], [0, 0, 0, 0], [4, 6, 2, 2]]
    groups = fake_quantize(weight, 2, "group", 2)  # scales 1/3, 2/3; tiny, tiny; 2, 1.6 / 3
    torch.testing.assert_close(groups, torch.tensor([[-1, 0, 2 / 3, 2], [0, 0, 0, 0], [4, 6, 1.6, 1.6]]))


@given(weights(shapes), bits)
def test_finer_ranges_are_never_worse(weight: Tensor, n: int) -> None:
    scales = {g: quantize(weight, n, g, 4).scale for g in GRANULARITIES}
    per_value = {g: s.repeat_interleave(weight.numel() // len(s)) for g, s in scales.items()}
    assert (per_value["channel"] <= per_value["tensor"]).all() and (
        per_value["group"] <= per_value["channel"]
    ).all()


def test_channels_help_where_they_differ() -> None:
    weight = hostile("normal", (16, 64), 0) * torch.logspace(-3, 0, 16).unsqueeze(1)
    error = {g: float((fake_quantize(weight, 4, g, 16) - weight).abs().max()) for g in GRANULARITIES}
    total = {g: float((fake_quantize(weight, 4, g, 16) - weight).pow(2).sum()) for g in GRANULARITIES}
    assert error["channel"] <= error["tensor"] and total["group"] < total["channel"] < 0.5 * total["tensor"]


@given(weights(shapes, DTYPES[1:]), bits, granularities)
def test_half_precision_is_computed_in_fp32(weight: Tensor, n: int, granularity: str) -> None:
    half, full = quantize(weight, n, granularity, 4), quantize(weight.float(), n, granularity, 4)
    assert torch.equal(half.levels, full.levels) and torch.equal(half.scale, full.scale)
    assert fake_quantize(weight, n, granularity, 4).dtype == weight.dtype


def test_the_whole_range_of_fp32() -> None:
    for weight in (torch.tensor([[3e38, -3e38, 0.0]]), torch.tensor([[1e-45, 0.0, -1e-45]])):
        found = fake_quantize(weight, 8, "tensor")
        assert torch.isfinite(found).all() and found[0, 2 if weight[0, 0] > 1 else 1] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nan_and_inf_name_the_layer(value: float, granularity: str) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = value
    with pytest.raises(NonFiniteWeight, match="^decoder.fc1.weight: holds NaN or Inf"):
        quantize(weight, 4, granularity, 4, "decoder.fc1.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_read_of_nan_or_inf_is_nan_where_its_range_is(value: float) -> None:
    """A read waits for no GPU, so it raises nothing: the loss shows it."""
    weight = torch.tensor([[1.0, 2.0], [value, 1.0], [0.0, -3.0]])
    found = fake_quantize(weight, 4)
    assert found[1].isnan().all() and torch.equal(found[::2], fake_quantize(weight[::2], 4))


@given(weights(shapes, DTYPES), bits, granularities)
def test_a_read_is_what_the_file_will_hold(weight: Tensor, n: int, granularity: str) -> None:
    before = weight.clone()
    stored = dequantize(quantize(weight, n, granularity, 4), weight.shape, weight.dtype)
    assert torch.equal(fake_quantize(weight, n, granularity, 4), stored) and torch.equal(weight, before)


def test_group_sizes_that_do_not_fit_name_the_numbers() -> None:
    with pytest.raises(
        BlockSizeError, match="^fc1.weight: group_size has to divide the 12 weights of a row, found 8$"
    ):
        ranges_shape((5, 12), "group", 8, "fc1.weight")
    assert ranges_shape((5, 4, 3, 3), "group", 9) == (20, 9) and ranges_shape(
        (5, 4, 3, 3), "channel", 9
    ) == (5, 36)
    # a forged shape is a number, not an overflow
    assert ranges_shape((10**19, 2), "tensor", 1) == (1, 2 * 10**19)
