"""Operations on integers, against loops over Python's own."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_qn.quant import integer_ops
from fairseq_qn.quant.fixed_point import multiplier, rescale
from fairseq_qn.quant.integer import Ranges, steps_of

LOW, HIGH = -(2**31), 2**31 - 1
SEEDS = st.integers(0, 10_000)


def draw(low: int, high: int, *shape: int, seed: int) -> torch.Tensor:
    """Integers within both ends, which are drawn often."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(low, high + 1, shape, generator=generator)
    ends = torch.randint(0, 4, shape, generator=generator)
    return torch.where(ends == 0, low, torch.where(ends == 1, high, x))


@given(SEEDS, st.integers(0, 255))
def test_linear(seed: int, zero: int) -> None:
    q, w = draw(0, 255, 3, 7, seed=seed), draw(-127, 127, 4, 7, seed=seed + 1)
    b = draw(-(2**30), 2**30, 4, seed=seed + 2)
    found = integer_ops.linear(q.to(torch.uint8), zero, w.to(torch.int8), b.int())
    expected = [
        [
            sum((x - zero) * y for x, y in zip(row, column, strict=True)) + c
            for column, c in zip(w.tolist(), b.tolist(), strict=True)
        ]
        for row in q.tolist()
    ]
    assert found.dtype == torch.int32 and found.tolist() == expected


@given(
    SEEDS, st.integers(0, 255), st.sampled_from([((1, 1), (0, 0), (1, 1), 1), ((2, 1), (1, 2), (1, 2), 2)])
)
def test_conv2d(seed: int, zero: int, how: tuple) -> None:
    (sy, sx), (py, px), (dy, dx), groups = how
    q, w = draw(0, 255, 1, 4, 5, 6, seed=seed), draw(-127, 127, 2, 4 // groups, 3, 2, seed=seed + 1)
    b = draw(-(2**30), 2**30, 2, seed=seed + 2)
    padding = (px, px, py, py)
    found = integer_ops.conv2d(
        q.to(torch.uint8), zero, w.to(torch.int8), b.int(), (sy, sx), padding, (dy, dx), groups
    )
    image, kernel = q[0].tolist(), w.tolist()
    assert found.dtype == torch.int32
    for (o, y, x), value in zip(
        itertools.product(*map(range, found.shape[1:])), found.flatten().tolist(), strict=True
    ):
        total = int(b[o])
        for i, ky, kx in itertools.product(range(4 // groups), range(3), range(2)):
            row, column = y * sy - py + ky * dy, x * sx - px + kx * dx
            if 0 <= row < 5 and 0 <= column < 6:  # padding is what stands for 0.0
                channel = i + (o // (2 // groups)) * (4 // groups)
                total += (image[channel][row][column] - zero) * kernel[o][i][ky][kx]
        assert value == total


@given(SEEDS)
def test_add_saturates(seed: int) -> None:
    a, b = (draw(LOW, HIGH, 2, 5, seed=seed + i).int() for i in range(2))
    by = [multiplier(torch.tensor(m, dtype=torch.float64)) for m in (1.0, 0.75)]
    parts = [rescale(x, m).tolist() for x, m in zip((a, b), by, strict=True)]
    expected = [
        [max(LOW, min(HIGH, x + y)) for x, y in zip(*rows, strict=True)] for rows in zip(*parts, strict=True)
    ]
    found = integer_ops.add(a, b, *by)
    assert found.dtype == torch.int32 and found.tolist() == expected and parts[0] == a.tolist()


def mean(values: list[int], n: int) -> int:
    """To the nearest, halves away from zero."""
    exact = Fraction(sum(values), n)
    size = int(abs(exact) + Fraction(1, 2))
    return size if exact > 0 else -size


@given(SEEDS, st.sampled_from([(2, 2), (3, 1), (1, 4)]), st.booleans())
def test_average_pools(seed: int, kernel: tuple[int, int], far: bool) -> None:
    x = draw(*((LOW, HIGH) if far else (-3, 3)), 1, 2, 6, 4, seed=seed).int()
    padding = (kernel[0] // 2, 0)
    found = integer_ops.average_pool2d(x, kernel, kernel, padding)
    assert found.dtype == torch.int32
    for (c, y, z), value in zip(
        itertools.product(*map(range, found.shape[1:])), found.flatten().tolist(), strict=True
    ):
        top, left = y * kernel[0] - padding[0], z * kernel[1]
        window = x[0, c, max(0, top) : top + kernel[0], left : left + kernel[1]]
        assert value == mean(window.flatten().tolist(), kernel[0] * kernel[1])
    whole = integer_ops.average_all(x)
    assert whole.flatten().tolist() == [mean(channel.flatten().tolist(), 24) for channel in x[0]]
    assert whole.shape == (1, 2, 1, 1) and whole.dtype == torch.int32


@given(SEEDS, st.sampled_from([0.0, 1e-30, 1e-9, 0.3, -0.7, 40.0]))
def test_fold_is_a_gain_and_a_bias(seed: int, gain: float) -> None:
    """Whatever the gain, what stands for the layer is right to 2^-30 of its bias for each product."""
    w, x = draw(-127, 127, 1, 6, seed=seed), draw(-255, 255, 6, seed=seed + 1)
    scale, bias, gains = (torch.tensor([v], dtype=torch.float64) for v in (1e-4, -2.5, gain))
    weight, b, coarse = integer_ops.fold(w.to(torch.int8), scale, bias, gains)
    found = ((weight.long() * x).sum() + b.long()) * coarse
    exact = gain * 1e-4 * float((w * x).sum()) - 2.5
    assert weight.dtype == torch.int8 and int(b.abs()) <= 2**30
    assert abs(float(found) - exact) <= float(coarse) + 6 * 255 * 2.5 / 2**30
    assert gain in (0.0, 1e-30, 1e-9) or torch.equal(weight.long(), w if gain > 0 else -w)


@given(SEEDS, st.sampled_from([0.01, 0.5, 3.0]))
def test_symmetric_integers_of_a_channel_are_those_of_the_folded_weight(seed: int, gain: float) -> None:
    """Folding before quantisation, as published, is folding after it."""
    w = torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))

    def levels(rows: torch.Tensor) -> torch.Tensor:
        scale = rows.abs().amax(1, keepdim=True) / 127
        return steps_of(rows, Ranges(scale, torch.full_like(scale, 127), 254))

    assert (levels(w.double() * gain) - levels(w.double())).abs().max() == 0


@pytest.mark.parametrize(
    ("columns", "bias", "fit"), [(33_000, 2**30, True), (67_000, 0, False), (1, HIGH, False)]
)
def test_accumulators_that_may_overflow_are_seen(columns: int, bias: int, fit: bool) -> None:
    weight = torch.full((2, columns), -127, dtype=torch.int8)
    assert integer_ops.fits(weight, torch.tensor([0, -bias]).int()) is fit
