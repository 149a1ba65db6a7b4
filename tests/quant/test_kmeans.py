"""k-means: its stated rules on hostile input, and its objective against numpy's Lloyd and faiss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, hostile, weights
from torch import Tensor

from fairseq_qn.errors import NonFiniteWeight
from fairseq_qn.kernels import native
from fairseq_qn.quant.kmeans import Clusters, kmeans

ENGINES = [
    "torch",
    pytest.param(
        "compiled", marks=pytest.mark.skipif(native.library() is None, reason="the kernel was not compiled")
    ),
]


@contextlib.contextmanager
def using(engine: str) -> Iterator[None]:
    """Search with the plain torch code, or with the compiled kernel where it applies."""
    with pytest.MonkeyPatch.context() as patch:
        if engine == "torch":
            patch.setattr(native, "library", lambda: None)
        yield


def objective(x: Tensor, codes: Tensor, n_centroids: int) -> float:
    """sum of ||x_i - mean of its cluster||^2, in fp64, by a loop over clusters."""
    x, total = x.double(), 0.0
    for k in range(n_centroids):
        members = x[codes == k]
        total += float((members - members.mean(0)).pow(2).sum()) if len(members) else 0.0
    return total


def rounding(x: Tensor) -> float:
    """What fp32 arithmetic may be off by, in units of the objective."""
    spread = float((x.double() - x.double().mean(0)).abs().max())
    return 1e-5 * spread**2 + x.numel() * (1e-6 * spread + 1e-7 * float(x.double().abs().max())) ** 2


def same(a: Clusters, b: Clusters) -> bool:
    return torch.equal(a.codes, b.codes) and torch.equal(a.codebook, b.codebook) and a.history == b.history


def gaussian(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("engine", ENGINES)
@given(
    x=weights(st.tuples(st.integers(3, 60), st.integers(1, 5)), DTYPES),
    k=st.integers(2, 20),
    seed=st.integers(0, 99),
)
def test_the_objective_never_rises_and_is_what_it_says(engine: str, x: Tensor, k: int, seed: int) -> None:
    with using(engine):
        runs = [kmeans(x, k, iterations=i, seed=seed) for i in range(1, 8)]
    found = [objective(x, run.codes, k) for run in runs]
    slack = rounding(x)
    for before, after in zip(found, found[1:]):
        assert after <= before * (1 + 1e-5) + slack
    for run, value in zip(runs, found):
        assert all(after < before for before, after in zip(run.history, run.history[1:]))
        assert run.objective == pytest.approx(value, rel=1e-3, abs=slack)
        assert run.history == runs[-1].history[: len(run.history)]


@given(x=weights(st.tuples(st.integers(1, 60), st.integers(1, 5)), DTYPES), k=st.integers(2, 70))
def test_codes_and_codebook_fit_together(x: Tensor, k: int) -> None:
    run = kmeans(x, k)
    assert run.codebook.shape == (min(k, len(x)), x.shape[1]) and run.codebook.dtype == torch.float32
    assert run.codes.shape == (len(x),) and 0 <= int(run.codes.min()) <= int(run.codes.max()) < len(
        run.codebook
    )
    assert torch.isfinite(run.codebook).all()
    for code in run.codes.unique().tolist():
        mean = x[run.codes == code].double().mean(0)
        torch.testing.assert_close(run.codebook[code].double(), mean, rtol=1e-6, atol=1e-30)


@given(x=weights(st.tuples(st.integers(1, 40), st.integers(1, 5)), DTYPES), more=st.integers(0, 300))
def test_more_codewords_than_blocks_are_clipped_and_lose_nothing(x: Tensor, more: int) -> None:
    run = kmeans(x, len(x) + more)
    assert len(run.codebook) == len(x) and run.objective == 0
    assert torch.equal(run.codebook[run.codes.long()], x.float())


@given(x=weights(st.tuples(st.integers(3, 60), st.integers(1, 5)), DTYPES[1:]), k=st.integers(2, 20))
def test_half_precision_is_computed_in_fp32(x: Tensor, k: int) -> None:
    assert same(kmeans(x, k), kmeans(x.float(), k))


def test_a_seed_gives_one_codebook_and_another_seed_another() -> None:
    x = gaussian(2000, 4)
    assert same(kmeans(x, 16, seed=3), kmeans(x.clone(), 16, seed=3))
    torch.manual_seed(1)
    assert same(kmeans(x, 16), kmeans(x, 16, seed=0))  # the global generator plays no part
    books = [kmeans(x, 16, seed=seed).codebook for seed in range(4)]
    assert not any(torch.equal(a, b) for i, a in enumerate(books) for b in books[:i])


@pytest.mark.parametrize("engine", ENGINES)
def test_codes_do_not_depend_on_scale_or_shift(engine: str) -> None:
    x = (gaussian(3000, 4) * 1024).round() / 1024  # so that scaling and shifting below are exact
    with using(engine):
        run = kmeans(x, 32)
        for factor in (2.0**40, 2.0**-40, 2.0**-110):  # the last beyond what fp32 squares
            scaled = kmeans(x * factor, 32)
            assert torch.equal(scaled.codes, run.codes) and torch.equal(
                scaled.codebook, run.codebook * factor
            )
            assert scaled.objective == pytest.approx(run.objective * factor**2)
        shifted = kmeans(x + 8192, 32)
    assert (shifted.codes == run.codes).float().mean() > 0.999  # ties may fall otherwise
    assert shifted.objective == pytest.approx(run.objective, rel=1e-4)


@pytest.mark.parametrize("kind", ["huge", "tiny", "shifted"])
def test_huge_and_tiny_weights_are_clustered_as_well_as_any(kind: str) -> None:
    x = hostile(kind, (2000, 4), 5)
    x32 = x.double() - x.double().mean(0)
    plain = (x32 / x32.abs().max()).float()
    relative = [
        kmeans(w, 16).objective / float((w.double() - w.double().mean(0)).pow(2).sum()) for w in (x, plain)
    ]
    assert relative[0] == pytest.approx(relative[1], rel=1e-2) and relative[0] < 0.5


def test_the_largest_spread_that_fp32_holds() -> None:
    x = torch.tensor([[3e38], [3e38], [-3e38], [1e38], [3.4e38], [3.4e38]])
    run = kmeans(x, 3, iterations=50)
    assert torch.isfinite(run.codebook).all() and len(run.codes.unique()) == 3
    assert run.codes[4] == run.codes[5] != run.codes[2]


def test_unused_codewords_move_onto_blocks_that_differ() -> None:
    # the two nines have the largest errors
    x = torch.tensor([[0.0], [0.0], [0.0], [1.0], [5.0], [9.0], [9.0]])
    start = torch.tensor([[0.0], [1000.0], [2000.0]])
    first = kmeans(x, 3, start=start, iterations=1)
    assert first.codes.tolist() == [0] * 7 and first.codebook[1:].tolist() == [[0.0], [0.0]]
    second = kmeans(x, 3, start=start, iterations=2)
    assert sorted(second.codebook.flatten().tolist()) == [0.25, 5, 9]


@pytest.mark.parametrize("engine", ENGINES)
@given(distinct=st.integers(2, 30), copies=st.integers(1, 12), seed=st.integers(0, 999), data=st.data())
def test_all_codewords_are_used_where_there_are_enough_distinct_blocks(
    engine: str, distinct: int, copies: int, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(2, distinct))
    x = gaussian(distinct, 3, seed)
    x = torch.cat([x, *[x[:1]] * copies * distinct])  # one of them many times, so that draws collide
    with using(engine):
        run = kmeans(x, k, iterations=1000, seed=seed)
    assert len(run.codes.unique()) == k
    assert (run.objective == 0) == (k == distinct)


def test_more_empty_clusters_than_a_hundred() -> None:
    x = torch.cat([gaussian(300, 4), torch.zeros(20_000, 4)])
    run = kmeans(x, 256, iterations=20)
    assert len(run.codes.unique()) == 256


@pytest.mark.parametrize("k", [2, 3, 255, 256, 257, 4096])
def test_any_number_of_codewords(k: int) -> None:
    x = gaussian(5000, 2)
    run = kmeans(x, k, iterations=3)
    assert len(run.codes.unique()) == k == len(run.codebook)
    assert run.objective == pytest.approx(objective(x, run.codes, k), rel=1e-4)


@pytest.mark.parametrize("k", [32_769, pytest.param(65_536, marks=ENGINES[1].marks)])
def test_very_many_codewords(k: int) -> None:
    run = kmeans(gaussian(66_000, 2), k, iterations=1)
    assert run.codebook.shape == (k, 2) and int(run.codes.max()) == k - 1


@given(
    st.sampled_from([float("nan"), float("inf"), -float("inf")]), st.integers(0, 39), st.sampled_from(DTYPES)
)
def test_nan_and_inf_name_the_layer(value: float, place: int, dtype: torch.dtype) -> None:
    x = gaussian(10, 4).to(dtype)
    x.view(-1)[place] = value
    for k in (4, 100):
        with pytest.raises(NonFiniteWeight, match="^encoder.fc1.weight: 1 of 40 values are NaN or Inf"):
            kmeans(x, k, name="encoder.fc1.weight")


def lloyd(x: np.ndarray, centroids: np.ndarray, iterations: int) -> float:
    """Lloyd's algorithm with a loop over codewords, in fp64; the objective after the last step."""
    x, centroids = x.astype(np.float64), centroids.astype(np.float64)
    for _ in range(iterations):
        codes = np.stack([((x - c) ** 2).sum(1) for c in centroids]).argmin(0)
        centroids = np.stack(
            [x[codes == k].mean(0) if (codes == k).any() else c for k, c in enumerate(centroids)]
        )
    return float(((x - centroids[codes]) ** 2).sum())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("seed", range(3))
def test_not_worse_than_a_slow_lloyd_from_the_same_start(engine: str, seed: int) -> None:
    x = gaussian(1500, 4, seed)
    start = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:24]]
    with using(engine):
        found = kmeans(x, 24, iterations=12, start=start).objective
    assert found == pytest.approx(lloyd(x.numpy(), start.numpy(), 12), rel=1e-3)


@pytest.mark.parametrize("block_size", [8, 4])
def test_the_objective_is_that_of_faiss(block_size: int) -> None:
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed: pip install -e .[oracle]")
    x = gaussian(768 * 768 // block_size, block_size)
    start = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:256]]
    ours = kmeans(x, 256, iterations=20, start=start).objective
    other = faiss.Kmeans(block_size, 256, niter=20, seed=1, max_points_per_centroid=len(x))
    other.train(x.numpy(), init_centroids=start.numpy())
    codes = torch.from_numpy(other.index.search(x.numpy(), 1)[1][:, 0])
    assert ours == pytest.approx(objective(x, codes, 256), rel=1e-3)


@given(
    x=weights(st.tuples(st.integers(1, 50), st.integers(1, 5))),
    k=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_a_step_against_loops(x: Tensor, k: int, seed: int) -> None:
    scale = float(x.abs().max()) or 1.0
    x = x / scale
    start = gaussian(k, x.shape[1], seed)
    distances = torch.stack([(x.double() - c.double()).pow(2).sum(1) for c in start])  # [k, n]
    for engine in ("torch", "compiled"):
        with using(engine):
            found = kmeans(x, k, iterations=1, start=start)
        codes = found.codes.long()
        assert found.codes.dtype == torch.int32
        if found.objective == 0:  # no more than k rows differ
            assert torch.equal(found.codebook[codes], x)
            continue
        torch.testing.assert_close(
            distances.gather(0, codes.unsqueeze(0))[0], distances.amin(0), rtol=1e-4, atol=1e-5
        )
        for j in range(k):
            members = x[codes == j].double()
            expected = members.mean(0) if len(members) else torch.zeros(x.shape[1]).double()
            torch.testing.assert_close(found.codebook[j].double(), expected, rtol=1e-6, atol=1e-8)
