"""Learned steps: the published first step, gradient and its scale, beside torch's learnable quantiser."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import hostile

from fairseq_qn.quant.integer import Ranges, steps_of
from fairseq_qn.quant.lsq import first, gradients, moved
from fairseq_qn.quant.ranges import TERNARY

HIGHEST = {1: 1, TERNARY: 1, 2: 1, 3: 3, 4: 7, 8: 127}


@pytest.mark.parametrize("bits", HIGHEST)
def test_the_first_step(bits: int | str) -> None:
    rows = hostile("normal", (5, 300), 2)
    mean = rows.abs().mean(1, keepdim=True)
    expected = mean if bits == 1 else 2 * mean / sqrt(HIGHEST[bits])
    torch.testing.assert_close(first(rows, bits).scale, expected)


@given(st.sampled_from([TERNARY, 2, 3, 4, 8]), st.integers(1, 50), st.integers(0, 999))
def test_gradients_against_torch(bits: int | str, n: int, seed: int) -> None:
    """torch rounds before it looks whether a weight is within, so weights from an end of the range to half a
    step beyond differ: none of them here.
    """
    ranges = first(hostile("normal", (4, n), seed), bits)
    lowest, highest = -int(ranges.zero[0]), HIGHEST[bits]
    ratio = 1.5 * highest * hostile("normal", (4, n), seed + 1)
    ratio = torch.where((ratio > highest) & (ratio < highest + 1), highest + 2, ratio)
    ratio = torch.where((ratio < lowest) & (ratio > lowest - 1), lowest - 2.0, ratio)
    ratio = torch.where((ratio.remainder(1) - 0.5).abs() < 1e-3, 0, ratio)
    rows, grad = (ratio * ranges.scale).requires_grad_(), hostile("normal", (4, n), seed + 2)
    scale, zeros = ranges.scale.squeeze(1).clone().requires_grad_(), torch.zeros(4)
    factor = 1 / sqrt(n * highest)
    theirs = torch._fake_quantize_learnable_per_channel_affine(
        rows, scale, zeros, 0, lowest, highest, factor
    )
    theirs.backward(grad)
    torch.testing.assert_close(steps_of(rows.detach(), ranges) * ranges.scale, theirs.detach())
    of_rows, of_step = gradients(grad, rows.detach(), ranges)
    torch.testing.assert_close(of_rows, rows.grad)
    torch.testing.assert_close(of_step, scale.grad, rtol=1e-4, atol=1e-4)


def test_by_hand() -> None:
    ranges = Ranges(torch.tensor([[0.5]]), torch.tensor([[2.0]]), 3)  # -1, -0.5, 0, 0.5
    rows, grad = torch.tensor([[0.2, 0.3, 0.6, -1.3]]), torch.tensor([[1.0, 10.0, 100.0, 1000.0]])
    of_rows, of_step = gradients(grad, rows, ranges)
    assert of_rows.tolist() == [[1, 10, 0, 0]]
    torch.testing.assert_close(
        of_step, torch.tensor([(-0.4 + 10 * 0.4 + 100 * 1 + 1000 * -2) / sqrt(4 * 1)])
    )
    of_rows, of_step = gradients(grad, rows, ranges, torch.tensor([[True, False, True, False]]))
    assert of_rows.tolist() == [[1, 10, 0, 1000]]
    torch.testing.assert_close(of_step, torch.tensor([(-0.4 + 100 * 1) / 2]))
    signs = Ranges(torch.tensor([[0.5]]), torch.tensor([[1.0]]), 2, signs=True)
    of_rows, of_step = gradients(grad, rows, signs)
    assert of_rows.tolist() == [[1, 10, 0, 0]]
    torch.testing.assert_close(of_step, torch.tensor([((1 - 0.4) + 10 * (1 - 0.6) + 100 - 1000) / 2]))


def test_a_step_stays_positive() -> None:
    ranges = first(torch.tensor([[1.0, -1.0], [2.0, 2.0]]), 4)
    found = moved(ranges, torch.tensor([-5.0, 0.25])).scale
    torch.testing.assert_close(found, torch.stack([ranges.scale[0] / 64, ranges.scale[1] + 0.25]))
