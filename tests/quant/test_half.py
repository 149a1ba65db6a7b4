"""fp16 that neither overflows nor vanishes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, weights
from torch import Tensor

from fairseq_qn.quant.half import narrowed, widened


@given(weights(st.just((6, 7)), DTYPES), st.integers(-125, 115))
def test_fp16_parts_keep_three_digits_at_any_scale(values: Tensor, power: int) -> None:
    """Of what is not 2^18 times smaller than the largest."""
    values = values.float()
    largest = float(values.abs().max())
    if largest:
        values = values / largest * 2.0**power
    narrow, exponent = narrowed(values, torch.float16)
    assert narrow.dtype == torch.float16 and torch.isfinite(narrow).all() and isinstance(exponent, int)
    wide = widened(narrow, exponent)
    assert wide.dtype == torch.float32
    torch.testing.assert_close(wide, values, rtol=6e-4, atol=2.0 ** (power - 18))


@pytest.mark.parametrize("value", [0.0, 2.0**-6, 1.0, 1.9, 2.0**15 - 16, -1.0])
def test_an_ordinary_tensor_needs_no_exponent(value: float) -> None:
    assert narrowed(torch.tensor([0.0, value]), torch.float16)[1] == 0


def test_scaling_is_exact() -> None:
    """A power of two: where fp16 holds the mantissa nothing is lost, however far away."""
    for power in (-100, -40, -8, 20, 100):
        values = torch.tensor([1.5, -0.75, 0.0, 1 + 2**-10]) * 2.0**power
        narrow, exponent = narrowed(values, torch.float16)
        assert exponent != 0 and torch.equal(widened(narrow, exponent), values)


def test_what_is_not_floating_point_stays_and_fp32_is_untouched() -> None:
    for values in (torch.tensor([1, 2**40]), torch.tensor([True]), torch.tensor(3, dtype=torch.int32)):
        narrow, exponent = narrowed(values, torch.float16)
        assert (
            torch.equal(widened(narrow, exponent), values) and narrow.dtype == values.dtype and exponent == 0
        )
    values = torch.tensor([1e-30, 3e38])
    assert torch.equal(narrowed(values, torch.float32)[0], values)
    assert narrowed(values.double(), torch.float32)[0].dtype == torch.float32
    empty = torch.empty(0)
    assert narrowed(empty, torch.float16)[1] == 0


def test_nan_and_inf_are_kept_as_they_are() -> None:
    values = torch.tensor([1.0, float("nan"), float("inf"), -float("inf")])
    narrow, exponent = narrowed(values, torch.float16)
    assert exponent == 0 and torch.equal(widened(narrow, 0).isnan(), values.isnan())


def test_double_is_kept_and_beyond_fp32_is_seen() -> None:
    values = torch.tensor([1 / 3, 1e300], dtype=torch.float64)
    narrow, exponent = narrowed(values, torch.float64)
    assert torch.equal(widened(narrow, exponent), values)
