"""Masks: their rate, what they depend on, and what they do to a weight, against a loop over blocks."""

from __future__ import annotations

from itertools import combinations
from math import sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, blocks_by_hand, weights_and_block_sizes
from torch import Tensor

from fairseq_qn.noise import Noise
from fairseq_qn.quant import noise
from fairseq_qn.quant.noise import bernoulli, drop_blocks, replace_blocks, seed_of


@pytest.mark.parametrize("p", [0, 1 / 65536, 0.001, 0.05, 0.3, 0.5, 0.9, 1])
@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_the_rate_is_p(p: float, seed: int) -> None:
    n = 400_001
    mask = bernoulli(n, p, seed)
    assert mask.dtype == torch.bool and mask.shape == (n,)
    spread = sqrt(n * p * (1 - p))
    assert abs(int(mask.sum()) - n * p) <= 5 * spread + (0 if p in (0, 1) else 1)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 7])
def test_any_number_of_draws(n: int) -> None:
    assert bernoulli(n, 0.5, 3).shape == (n,) and bernoulli(n, 1, 3).all() and not bernoulli(n, 0, 3).any()


def test_draws_are_independent_of_their_neighbours_and_of_their_place() -> None:
    """Four draws share a 64-bit number: every pair among eight in a row, and each place of the eight."""
    draws = bernoulli(800_000, 0.3, 7).reshape(-1, 8).double()
    n = len(draws)
    assert (draws.mean(0) - 0.3).abs().max() < 5 * sqrt(0.21 / n)
    for i, j in combinations(range(8), 2):
        assert abs(float(((draws[:, i] - 0.3) * (draws[:, j] - 0.3)).mean())) < 5 * 0.21 / sqrt(n)


def test_a_mask_depends_on_its_seed_and_nothing_else() -> None:
    first = bernoulli(1000, 0.3, 5)
    state = torch.random.get_rng_state()
    torch.manual_seed(9)
    bernoulli(77, 0.9, 1)
    assert torch.equal(bernoulli(1000, 0.3, 5), first)
    assert not torch.equal(bernoulli(1000, 0.3, 6), first)
    torch.random.set_rng_state(state)
    bernoulli(1000, 0.3, 5)
    assert torch.equal(torch.random.get_rng_state(), state)  # nobody else's random numbers move


@pytest.mark.parametrize("n", [0, 3, 8, 9, 15, 16, 17, 100])
def test_chunks_leave_no_trace(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = bernoulli(n, 0.4, 7)
    monkeypatch.setattr(noise, "CHUNK", 8)
    assert torch.equal(bernoulli(n, 0.4, 7), whole)


@pytest.mark.parametrize(
    ("p", "certain"), [(1, True), (1 - 2**-18, True), (1 - 2**-16, False), (0.5, False)]
)
def test_what_is_certain(p: float, certain: bool) -> None:
    assert noise.is_certain(p) == certain == bool(bernoulli(1_000_000, p, 3).all())


def test_a_larger_p_only_adds_blocks() -> None:
    masks = [bernoulli(5000, p, 5) for p in (0.1, 0.2, 0.7, 1)]
    assert all((b | ~a).all() and int(b.sum()) > int(a.sum()) for a, b in zip(masks, masks[1:]))


def test_every_part_of_a_seed_counts() -> None:
    base = (0, 100, 0, 0, "encoder.layers.0.fc1.weight")
    others = [
        (1, 100, 0, 0, base[4]), (0, 101, 0, 0, base[4]), (0, 100, 1, 0, base[4]), (0, 100, 0, 1, base[4]),
        (0, 100, 0, 0, "encoder.layers.0.fc2.weight"), (1, 0, 0, 0, base[4]), (10, 0, 0, 0, base[4]),
    ]  # fmt: skip
    seeds = [seed_of(*parts) for parts in (base, *others)]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**64 for seed in seeds)
    masks = [bernoulli(2000, 0.5, seed) for seed in seeds]
    for a, b in combinations(masks, 2):
        assert abs(float((a ^ b).double().mean()) - 0.5) < 5 * 0.5 / sqrt(2000)  # as unlike as strangers
    assert (
        seed_of(*base) == seed_of(*base) and seed_of(1, 23) != seed_of(12, 3) and seed_of(1) != seed_of("1")
    )


def noised_by_hand(weight: Tensor, phi: Tensor, mask: Tensor, block_size: int) -> Tensor:
    result = weight.clone()
    for hit, block in zip(mask.tolist(), blocks_by_hand(weight, block_size), strict=True):
        for index in block if hit else ():
            result[index] = phi[index]
    return result


@given(weights_and_block_sizes(DTYPES), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(0, 2**64 - 1))
def test_noised_weights_against_a_loop(case: tuple[Tensor, int], p: float, seed: int) -> None:
    weight, d = case
    before = weight.clone()
    mask = bernoulli(weight.numel() // d, p, seed)
    phi = weight.flip(0) + 1
    dropped, replaced = drop_blocks(weight, mask, d), replace_blocks(weight, phi.clone(), mask, d)
    assert torch.equal(dropped, noised_by_hand(weight, torch.zeros_like(weight), mask, d))
    assert torch.equal(replaced, noised_by_hand(weight, phi, mask, d))
    assert dropped.dtype == replaced.dtype == weight.dtype and dropped.shape == weight.shape
    assert torch.equal(weight, before)


def test_elements_are_blocks_of_one() -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    mask = torch.arange(12) % 3 == 0
    assert replace_blocks(weight, -weight, mask, 1).flatten().tolist() == [
        -i if i % 3 == 0 else i for i in range(12)
    ]


KNOTS = ((100, 0.0), (200, 0.1), (300, 0.1), (400, 0.5))


@pytest.mark.parametrize(
    ("knots", "update", "p"),
    [
        (((0, 0.2),), 0, 0.2), (((0, 0.2),), 10**9, 0.2), (((50, 0.2),), 3, 0.2), (KNOTS, 0, 0.0),
        (KNOTS, 100, 0.0),
        (KNOTS, 125, 0.025), (KNOTS, 199, 0.099), (KNOTS, 200, 0.1), (KNOTS, 250, 0.1), (KNOTS, 350, 0.3),
        (KNOTS, 400, 0.5),
        (KNOTS, 10**9, 0.5), (((0, 0.1), (10, 0.1), (10, 0.7)), 9, 0.1),
        (((0, 0.1), (10, 0.1), (10, 0.7)), 10, 0.7),
        (((0, 0.4), (10, 0.0)), 5, 0.2),
    ],
)  # fmt: skip
def test_schedule(knots: tuple[tuple[int, float], ...], update: int, p: float) -> None:
    assert Noise("proxy", knots).at(update) == pytest.approx(p)


@given(
    st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), min_size=1, max_size=5).map(sorted),
    st.integers(-5, 60),
)
def test_a_schedule_stays_between_its_knots(knots: list[tuple[int, float]], update: int) -> None:
    p = Noise("proxy", tuple(knots)).at(update)
    assert min(v for _, v in knots) - 1e-12 <= p <= max(v for _, v in knots) + 1e-12
    if update in dict(knots):
        assert p == pytest.approx(dict(knots)[update])
