"""Widths of groups: pseudo-noise, rounding, streams of mixed widths, against references in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import weights

from fairseq_qn.errors import FormatError
from fairseq_qn.quant.learned_bits import (
    PseudoNoise,
    bits_of,
    fake_quantize,
    first_logit,
    noised,
    pack_groups,
    stream_bytes,
    unpack_groups,
    widths_of,
)

WIDTHS = st.lists(st.integers(1, 15), min_size=1, max_size=9)


def packed_by_hand(levels: list[list[int]], widths: list[int]) -> list[int]:
    """Groups by width, each code with its lowest bit first, each width's stream filled up with zeros."""
    found: list[int] = []
    for b in sorted(set(widths)):
        codes = [code for own, row in zip(widths, levels) if own == b for code in row]
        stream = [code >> i & 1 for code in codes for i in range(b)]
        stream += [0] * (-len(stream) % 8)
        found += [
            sum(bit << i for i, bit in enumerate(stream[at : at + 8])) for at in range(0, len(stream), 8)
        ]
    return found


@given(WIDTHS, st.integers(1, 20), st.randoms(use_true_random=False))
def test_streams_round_trip(widths: list[int], size: int, random: object) -> None:
    levels = [[random.randrange(2**b) for _ in range(size)] for b in widths]
    packed = pack_groups(torch.tensor(levels), torch.tensor(widths))
    assert packed.tolist() == packed_by_hand(levels, widths)
    bits = sum(widths) * size
    assert bits <= 8 * len(packed) < bits + 8 * len(set(widths))
    assert stream_bytes(torch.tensor(widths), size) == len(packed)
    assert unpack_groups(packed, torch.tensor(widths), size).tolist() == levels


@given(WIDTHS, st.integers(1, 20))
def test_widths_that_do_not_add_up(widths: list[int], size: int) -> None:
    packed = torch.zeros(stream_bytes(torch.tensor(widths), size), dtype=torch.uint8)
    for wrong in (packed[1:], torch.cat([packed, packed[:1]])):
        with pytest.raises(FormatError, match=r"^levels: expected \d+ bytes of the widths, found \d+"):
            unpack_groups(wrong, torch.tensor(widths), size)


@given(weights(), st.integers(1, 15), st.integers(1, 15))
def test_rounding_by_hand(w: torch.Tensor, first: int, other: int) -> None:
    """Half a step from the weight, evenly from the least weight to the greatest, of all groups."""
    widths = torch.tensor([first, other] * len(w))[: len(w)]
    found = fake_quantize(w, widths).double().numpy()
    low, high = float(w.min()), float(w.max())
    for row, result, b in zip(w.double().numpy(), found, widths.tolist()):
        step = max((high - low) / (2**b - 1), 1.2e-38)
        slack = 1e-6 * max(abs(low), abs(high)) + 2e-38
        assert (np.abs(result - row) <= step / 2 + slack).all()
        levels = (result - low) / step
        if slack < 0.01 * step:
            assert (np.abs(levels - np.rint(levels)) < 0.02).all()
            assert levels.min() > -0.5 and levels.max() < 2**b - 0.5


def u_of(n: int, kind: str, seed: int, **more: object) -> torch.Tensor:
    return PseudoNoise(kind, seed, **more).draws(n, torch.device("cpu"))


def normal(x: torch.Tensor) -> torch.Tensor:
    return torch.special.ndtr(x.double() * 2)


@pytest.mark.parametrize(("kind", "cdf"), [("uniform", lambda x: x.double() + 0.5), ("gaussian", normal)])
def test_noise_is_what_it_is_called(kind: str, cdf: object) -> None:
    n = 1 << 20
    for seed in (3, 1 << 40):
        u = u_of(n, kind, seed)
        far = (cdf(u.sort().values) - (torch.arange(n) + 0.5) / n).abs().max()  # Kolmogorov and Smirnov's
        assert far < 1.95 / n**0.5 + (kind == "gaussian") * 8e-4
        assert float(u.abs().max()) < 0.5 if kind == "uniform" else 2.1 < float(u.abs().max()) < 2.3
        other = u_of(n, kind, seed + 1)
        for a, b in ((u, other), (u[1:], u[:-1]), (u[16:], u[:-16]), (u.abs(), other.abs())):
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / n**0.5
        assert torch.equal(u[:99], u_of(99, kind, seed))
        some = u_of(n, kind, seed, p=0.3, skip=(7, 20))
        drawn = some != 0
        assert torch.equal(some[drawn], u[drawn]) and not drawn[7:27].any()
        assert abs(float(drawn.float().mean()) - 0.3) < 5 * (0.21 / n) ** 0.5
        assert abs(float(u[drawn].mean())) < 0.005, "which are drawn says nothing of how far"


def test_gradients() -> None:
    """As finite differences have them: of the bits, and of the weights, the ends of the range among them."""
    torch.manual_seed(0)
    rows, upstream = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    noise = PseudoNoise("gaussian", seed=7)
    u = noise.draws(12, rows.device).view(3, 4).double()
    rows.requires_grad_()
    logits = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)

    def value(at: torch.Tensor) -> torch.Tensor:
        return (noised(rows, bits_of(at, 2, 15).double(), noise) * upstream).sum()

    value(logits).backward()
    steps = (rows.detach().amax() - rows.detach().amin()) / (torch.exp2(bits_of(logits.detach(), 2, 15)) - 1)
    slope = (steps.unsqueeze(1) * u * upstream).sum() / (rows.detach().amax() - rows.detach().amin())
    expected = upstream.clone().flatten()
    expected[rows.detach().argmax()] += slope
    expected[rows.detach().argmin()] -= slope
    torch.testing.assert_close(rows.grad.flatten(), expected, rtol=1e-5, atol=1e-6)
    low, high = float(rows.detach().min()), float(rows.detach().max())
    for i, at in enumerate(logits.tolist()):
        share = 1 / (1 + math.exp(-at))
        bits = 2 + 13 * share
        slope = -(high - low) * math.log(2) * 2**bits / (2**bits - 1) ** 2 * 13 * share * (1 - share)
        assert float(logits.grad[i]) == pytest.approx(slope * float((u[i] * upstream[i]).sum()), rel=1e-4)


@pytest.mark.parametrize(("least", "most"), [(2, 15), (3, 9), (2, 4), (8, 8), (9, 12)])
def test_bits_begin_at_eight_and_keep_within_bounds(least: int, most: int) -> None:
    first = float(bits_of(torch.tensor([first_logit(least, most)]), least, most))
    assert first == pytest.approx(8 if least < 8 < most else (least + most) / 2, abs=1e-4)
    widths = widths_of(torch.tensor([-1e9, -3.0, 0.1, 5.0, 1e9]), least, most)
    assert widths.dtype == torch.uint8 and widths.tolist() == sorted(widths.tolist())
    assert (int(widths[0]), int(widths[-1])) == (least, most)
