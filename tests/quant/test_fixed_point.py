"""Fixed point, against the definition in Python's own integers and fractions."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_qn.errors import UnsupportedError
from fairseq_qn.quant.fixed_point import high_multiply, multiplier, requantize, rescale, rounding_shift

LOW, HIGH = -(2**31), 2**31 - 1
ENDS = [LOW, LOW + 1, -(2**30), -3, -2, -1, 0, 1, 2, 3, 2**30, 2**30 + 1, HIGH - 1, HIGH]
INT32 = st.one_of(st.sampled_from(ENDS), st.integers(LOW, HIGH), st.integers(-(2**16), 2**16))
REAL = st.one_of(
    st.floats(0, 1),
    st.sampled_from(
        [0.0, 1e-300, 2.0**-33, 2.0**-32, 2.0**-31, 0.5, 1 - 2**-53, 1 - 2**-33, 1.0, 1.5, 1e30]
    ),
    st.floats(1e-12, 2.0**20),
)


def nearest(x: Fraction) -> int:
    """Halves away from zero."""
    size = floor(abs(x) + Fraction(1, 2))
    return size if x > 0 else -size


def saturated(x: int, low: int = LOW, high: int = HIGH) -> int:
    return max(low, min(high, x))


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


def product(x: int, factor: int, shift: int) -> int:
    """x M as published, with a left shift inside the first rounding where M >= 1."""
    first = saturated(nearest(Fraction(x * factor * 2 ** max(0, -shift), 2**31)))
    return nearest(Fraction(first, 2 ** max(0, shift)))


@given(REAL)
def test_a_multiplier_is_the_nearest(value: float) -> None:
    found = multiplier(one(value))
    factor, shift = int(found.factor), int(found.shift)
    if value == 0:
        assert factor == 0
    elif value >= 2.0**31:
        assert (factor, shift) == (HIGH, -31)
    else:
        assert 2**30 <= factor <= HIGH
        if shift < 62:
            assert abs(Fraction(factor, 2**31) * Fraction(2) ** -shift / Fraction(value) - 1) <= Fraction(
                1, 2**31
            )


@given(INT32, INT32)
def test_high_multiply(x: int, factor: int) -> None:
    found = high_multiply(int32(x), int32(factor))
    assert found.dtype == torch.int32
    assert int(found) == saturated(nearest(Fraction(x * factor, 2**31)))


@given(INT32, st.integers(0, 62))
def test_rounding_shift(x: int, n: int) -> None:
    assert int(rounding_shift(int32(x), int32(n))) == nearest(Fraction(x, 2**n))


@given(INT32, REAL, st.integers(0, 255))
def test_rescale_and_requantize(x: int, value: float, zero: int) -> None:
    by = multiplier(one(value))
    expected = product(x, int(by.factor), int(by.shift))
    assert int(rescale(int32(x), by)) == saturated(expected)
    found = requantize(int32(x), by, zero)
    assert found.dtype == torch.uint8 and int(found) == saturated(saturated(expected) + zero, 0, 255)
    # and so within a unit of the real product
    exact = saturated(nearest(x * Fraction(value)))
    assert abs(saturated(expected) - exact) <= 1 + abs(exact) // 2**30


def test_channels_have_their_own() -> None:
    x, values = int32(-100, 100, 7).expand(2, 3), torch.tensor([[0.5], [0.01]], dtype=torch.float64)
    assert rescale(x, multiplier(values)).tolist() == [[-50, 50, 4], [-1, 1, 0]]


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_what_is_no_multiplier_is_refused(value: float) -> None:
    with pytest.raises(UnsupportedError, match="^multiplier: expected a finite number, 0 or above, found"):
        multiplier(one(value))
