"""Ranges by each method: what they may lose, against numpy, torch and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import hostile, weights
from torch import Tensor

from fairseq_qn.quant.integer import Ranges, fake_quantize, steps_of
from fairseq_qn.quant.ranges import BINS, METHODS, TERNARY, find, zero_and_top

CLIPPED = METHODS[1:]
widths = st.sampled_from([2, 3, 4, 5, 6, 7, 8, TERNARY])


def read(rows: Tensor, ranges: Ranges) -> Tensor:
    return steps_of(rows, ranges) * ranges.scale


def error(rows: Tensor, ranges: Ranges) -> Tensor:
    """By range, in float64."""
    return (read(rows, ranges).double() - rows.double()).square().sum(1)


@given(
    st.sampled_from(CLIPPED), st.integers(2, 8), st.booleans(), st.integers(32, 3000), st.booleans(),
    st.integers(0, 999),
)  # fmt: skip
def test_one_outlier_does_not_zero_its_channel(
    method: str, bits: int, symmetric: bool, n: int, above: bool, seed: int
) -> None:
    """50 among N(0, 0.02): min-max leaves nothing of the others."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, n, generator=generator) * 0.02
    rows[torch.arange(3), torch.randint(0, n, (3,), generator=generator)] = 50.0 if above else -50.0
    found, inner = read(rows, find(rows, method, bits, symmetric)), rows.abs() < 1
    lost = (found - rows)[inner].square().sum() / rows[inner].square().sum()
    assert lost < (0.85 if bits == 2 else 0.5) and (found != 0).float().mean(1).min() > 0.02
    kept = read(rows, find(rows, "minmax", bits, symmetric))
    assert not kept[inner].any()


@given(weights(), widths, st.booleans(), st.sampled_from(METHODS))
def test_levels_within_the_grid_and_zero_exact(
    rows: Tensor, bits: int | str, symmetric: bool, method: str
) -> None:
    if bits == TERNARY:
        method, symmetric = "least_squares", True
    ranges = find(rows, method, bits, symmetric)
    zero, top = zero_and_top(bits, symmetric)
    assert ranges.scale.shape == ranges.zero.shape == (len(rows), 1)
    assert (ranges.scale > 0).all() and torch.isfinite(ranges.scale).all()
    assert (ranges.zero == (ranges.zero.round() if zero is None else zero)).all()
    levels = steps_of(rows, ranges) + ranges.zero
    assert levels.min() >= 0 and levels.max() <= top and not read(rows, ranges)[rows == 0].any()


@settings(max_examples=40)
@given(weights(), st.integers(2, 8), st.sampled_from(["channel", "tensor"]))
def test_symmetric_against_torch(weight: Tensor, bits: int, granularity: str) -> None:
    """torch's symmetric observer over -127 .. 127, and its reading."""
    highest = 2 ** (bits - 1) - 1
    rows = weight if granularity == "channel" else weight.reshape(1, -1)
    ranges = find(rows, "minmax", bits, True)
    scale = (rows.abs().amax(1) / highest).clamp_min(torch.finfo(torch.float32).tiny)
    torch.testing.assert_close(ranges.scale.squeeze(1), scale, rtol=1e-6, atol=0)
    lowest, zeros = -highest - (bits < 8), torch.zeros(len(rows), dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(rows, scale, zeros, 0, lowest, highest)
    ours = fake_quantize(weight, bits, granularity, ranges=ranges).reshape(rows.shape)
    ties = ((rows / scale.unsqueeze(1)).remainder(1) - 0.5).abs() < 1e-4  # torch multiplies by 1 / scale
    assert (
        torch.where(ties | (scale < 1e-30).unsqueeze(1), 0, (ours - theirs).abs() / scale.unsqueeze(1)).max()
        < 1e-3
    )
    assert (steps_of(rows, ranges).abs() <= highest).all()


@pytest.mark.parametrize("n", [1, 2, 5, 999, 1001, 5000])
def test_percentile_against_numpy(n: int) -> None:
    rows = hostile("normal", (4, n), n)
    if n < 3:  # all but one at each end is none
        assert torch.isfinite(find(rows, "percentile", 4, True).scale).all()
        return
    sizes = np.quantile(rows.abs().double().numpy(), 0.999, axis=1, method="lower")
    found = find(rows, "percentile", 4, True).scale.squeeze(1).double() * 7
    np.testing.assert_allclose(found, sizes, rtol=1e-6)
    found = find(rows, "percentile", 4, False)
    low, high = (
        np.quantile(rows.double().numpy(), q, axis=1, method=m)
        for q, m in ((0.001, "higher"), (0.999, "lower"))
    )
    np.testing.assert_allclose(
        found.scale.squeeze(1).double() * 15, np.maximum(high, 0) - np.minimum(low, 0), rtol=1e-5
    )


def brute_force(rows: Tensor, bits: int | str, symmetric: bool) -> Tensor:
    """The least square error over a grid of 200 scales and every zero."""
    zero, top = zero_and_top(bits, symmetric)
    least = torch.full((len(rows),), torch.inf, dtype=torch.float64)
    largest = rows.abs().amax(1, keepdim=True)
    for at in range(top + 1) if zero is None else [zero]:
        for factor in torch.linspace(0.01, 2, 200):
            scale = largest * factor / max(1, top // 2)
            least = torch.minimum(least, error(rows, Ranges(scale, torch.full_like(scale, at), top)))
    return least


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, TERNARY])
@pytest.mark.parametrize("kind", ["normal", "one_signed", "duplicated", "sparse", "huge", "tiny"])
def test_least_squares_against_brute_force(kind: str, bits: int | str, symmetric: bool) -> None:
    if bits == TERNARY and not symmetric:
        return
    rows = hostile(kind, (6, 200), 3)
    ours, least = (
        error(rows, find(rows, "least_squares", bits, symmetric)),
        brute_force(rows, bits, symmetric),
    )
    assert (ours <= 1.05 * least).all(), ours / least


@given(st.sampled_from(["normal", "one_signed", "duplicated", "huge", "tiny", "shifted"]), st.integers(2, 8),
       st.booleans(), st.integers(16, 400), st.integers(0, 99))  # fmt: skip
def test_least_squares_are_no_worse_than_min_max(
    kind: str, bits: int, symmetric: bool, n: int, seed: int
) -> None:
    rows = hostile(kind, (3, n), seed)
    ours, minmax = (
        error(rows, find(rows, method, bits, symmetric)) for method in ("least_squares", "minmax")
    )
    assert (ours <= minmax * 1.001 + 1e-9 * rows.double().square().sum(1)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_histogram_finds_what_the_weights_do(bits: int, symmetric: bool) -> None:
    rows = hostile("normal", (2, 20 * BINS), 1)
    exact, binned = (
        error(rows, find(rows, method, bits, symmetric)) for method in ("least_squares", "histogram")
    )
    torch.testing.assert_close(binned, exact, rtol=0.01, atol=0)
    short = rows[:, :BINS]
    assert all(torch.equal(getattr(find(short, "histogram", bits, symmetric), part),
                           getattr(find(short, "least_squares", bits, symmetric), part))
               for part in ("scale", "zero"))  # fmt: skip


@given(weights())
def test_one_bit_is_the_sign_times_the_mean_size(rows: Tensor) -> None:
    found = read(rows, find(rows, "least_squares", 1, True))
    size = rows.double().abs().mean(1, keepdim=True).float()
    assert torch.equal(found, torch.where(rows < 0, -size, size))
    least = error(rows, find(rows, "least_squares", 1, True)) - 1e-6 * rows.double().square().sum(1)
    for other in (0.9, 1.1):  # of all +-scale it has the least square error
        assert (error(rows, Ranges(size * other, torch.ones_like(size), 2, True)) >= least).all()
