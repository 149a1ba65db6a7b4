"""Where k-means starts on what is not ordinary: never worse than faiss, exact where few blocks differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import weights
from test_kmeans import ENGINES, gaussian, objective, same, using
from torch import Tensor

from fairseq_qn.quant import kmeans as module
from fairseq_qn.quant import seeding
from fairseq_qn.quant.kmeans import kmeans

K, N = 32, 1280


def one_in(share: float, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=g) < share


def copies(distinct: int, power: float, n: int = N) -> Callable[[torch.Generator], Tensor]:
    """n copies of so many blocks, the k-th of them drawn in proportion to k ** -power."""

    def make(g: torch.Generator) -> Tensor:
        blocks, shares = torch.randn(distinct, 8, generator=g), torch.arange(1, distinct + 1.0) ** -power
        return blocks[torch.multinomial(shares, n, replacement=True, generator=g)]

    return make


def whole(low: int, high: int, d: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(low, high + 1, (N, d), generator=g).float()


def normal(n: int = N, d: int = 8) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(n, d, generator=g)


def student(df: int, n: int = N, d: int = 8) -> Callable[[torch.Generator], Tensor]:
    return lambda g: (
        torch.randn(n, d, generator=g) / (torch.randn(df, n, d, generator=g).square().sum(0) / df).sqrt()
    )


def scaled(share: float, shape: tuple[int, ...], factor: float) -> Callable[[torch.Generator], Tensor]:
    """Normal blocks, of which this share of elements [N, 8] or rows [N, 1] is larger, or zero."""
    return lambda g: torch.randn(N, 8, generator=g) * torch.where(one_in(share, shape, g), factor, 1.0)


BLOCKS = {
    "normal": normal(),
    "normal, a sample": normal(n=8 * N),
    "copies of K": copies(K, 0),
    "copies of K + 1": copies(K + 1, 0),
    "copies of 3 K": copies(3 * K, 0),
    "copies of 10 K": copies(10 * K, 0, n=8 * N),
    "skewed copies of K / 2": copies(K // 2, 1.5),
    "skewed copies of 1.5 K": copies(3 * K // 2, 1),
    "skewed copies of 3 K": copies(3 * K, 1.5),
    "skewed copies of 10 K": copies(10 * K, 1, n=8 * N),
    "binary": whole(0, 1, 8),
    "binary, as many as codewords": whole(0, 1, 5),
    "binary, mostly 0": lambda g: one_in(0.1, (N, 8), g).float(),
    "ternary": whole(-1, 1, 4),
    "ternary, mostly 0": lambda g: (torch.randn(N, 8, generator=g) / 1.3).trunc().clamp(-1, 1),
    "four bits": lambda g: (torch.randn(N, 2, generator=g) * 2).round(),
    "90% zeros": scaled(0.9, (N, 8), 0.0),
    "90% zero blocks": scaled(0.9, (N, 1), 0.0),
    "99% zero blocks": scaled(0.99, (N, 1), 0.0),
    "outlying blocks": scaled(0.01, (N, 1), 100.0),
    "outlying elements": scaled(0.001, (N, 8), 1000.0),
    "Cauchy": student(1),
    "Cauchy, d 4": student(1, n=8 * N, d=4),
    "Student t, 2": student(2),
    "Student t, 3": student(3, n=8 * N),
    "Student t, 5": student(5),
    "K + 1 blocks": normal(K + 1),
    "1.1 K blocks": normal(K + 4),
    "2 K blocks": normal(2 * K),
    "2 K blocks, Cauchy": student(1, n=2 * K),
    "2 K blocks, binary": lambda g: whole(0, 1, 8)(g)[: 2 * K],
    "4 K blocks": normal(4 * K),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_never_worse_than_faiss(name: str) -> None:
    """By more than 1%, on the mean of the ratio over seeds, with as many iterations, all points and one
    run.
    """
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed: pip install -e .[oracle]")
    ratios = []
    for seed in range(6):
        x = BLOCKS[name](torch.Generator().manual_seed(seed))
        points = {"min_points_per_centroid": 1, "max_points_per_centroid": len(x)}
        other = faiss.Kmeans(x.shape[1], K, seed=seed, niter=20, nredo=1, **points)
        other.train(x.numpy())
        codes = torch.from_numpy(other.index.search(x.numpy(), 1)[1][:, 0])
        found, theirs = objective(x, kmeans(x, K, seed=seed).codes, K), objective(x, codes, K)
        ratios.append(found / theirs if found else 0.0)
    assert sum(ratios) / len(ratios) < 1.01, ratios


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("greedy", [module.GREEDY, 3])
@given(
    blocks=weights(st.tuples(st.integers(2, 20), st.integers(1, 5))),
    copies=st.integers(2, 80),
    more=st.integers(0, 9),
    seed=st.integers(0, 99),
)
@example(blocks=torch.tensor([[1.5, -0.25]] * 2), copies=16, more=0, seed=0)
@example(blocks=torch.tensor([[-1.0], [0.8], [0.8002]]), copies=3, more=0, seed=0)
@example(blocks=torch.tensor([[1.0], [-1.0], [1e-30], [2e-30]]), copies=3, more=0, seed=2)
def test_where_no_more_blocks_differ_than_codewords_nothing_is_lost(
    engine: str, greedy: int, blocks: Tensor, copies: int, more: int, seed: int
) -> None:
    x, k = torch.cat([blocks, *[blocks[:1]] * copies, *[blocks[-1:]] * copies]), len(blocks) + more
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    with using(engine), pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GREEDY", greedy)
        run = kmeans(x, k, iterations=1, seed=seed)
    assert run.objective == 0 and torch.equal(run.codebook[run.codes.long()], x)


@pytest.mark.parametrize("greedy", [module.GREEDY, 3])
def test_codewords_without_blocks_are_all_moved(greedy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GREEDY", greedy)
    x = torch.cat([gaussian(40, 3), *[gaussian(3, 3, 1)] * 100])
    start = torch.cat([torch.zeros(1, 3), torch.arange(1000.0, 1090.0).reshape(30, 3)])
    used = [len(kmeans(x, 31, start=start, iterations=i).codes.unique()) for i in (1, 2, 20)]
    assert used[0] == 1 and used[2] == 31
    assert used[1] == 31 or greedy == 3, "at once, where they are chosen one by one"


def test_errors_that_fp32_cannot_hold_beside_the_largest_weight() -> None:
    x = torch.cat([torch.full((40, 1), 3e38), torch.arange(40.0).reshape(-1, 1) * 1e-10])
    assert kmeans(x, 4, start=torch.tensor([[3e38], [0.0], [2e38], [2.1e38]])).codes.unique().tolist() == [
        0,
        1,
    ]


@pytest.mark.parametrize("name", ["90% zeros", "Cauchy", "2 K blocks"])
def test_a_start_apart_depends_neither_on_threads_nor_on_the_engine(name: str) -> None:
    x = BLOCKS[name](torch.Generator().manual_seed(0))
    threads, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            runs.append(kmeans(x, K))
    finally:
        torch.set_num_threads(threads)
    assert same(runs[0], runs[1]) and same(runs[0], runs[2])
    with using("torch"):
        assert kmeans(x, K).objective == pytest.approx(runs[0].objective, rel=0.02)


def test_ordinary_weights_start_from_drawn_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeding, "apart", None)
    for n, d in ((8 * K, 8), (N, 4), (8 * N, 8)):
        assert len(kmeans(gaussian(n, d) * 0.02, K).history) > 1


@given(x=weights(st.tuples(st.integers(2, 40), st.integers(1, 5))), other=st.integers(0, 39))
def test_keys_are_equal_where_rows_are(x: Tensor, other: int) -> None:
    x = torch.cat([x, -x, 0 * -x])
    assert len(seeding.keys(x).unique()) == len(x.unique(dim=0))
    assert torch.equal(seeding.keys(x)[other % len(x)], seeding.keys(x[other % len(x)].unsqueeze(0))[0])


@given(
    x=weights(st.tuples(st.integers(2, 40), st.integers(1, 4))),
    count=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_no_copy_of_a_row_is_chosen(x: Tensor, count: int, seed: int) -> None:
    x = (x - x.mean(0)) / max(float((x - x.mean(0)).abs().max()), 1e-30)
    errors = torch.where((x == x[0]).all(1), 0.0, 4.0 * x.shape[1])  # the first has a codeword
    chosen = seeding.apart(
        x, torch.ones(len(x)).double(), count, torch.Generator().manual_seed(seed), errors
    )
    found = torch.cat([x[:1], x[chosen]])
    assert len(found.unique(dim=0)) == len(found) == min(count + 1, len(x.unique(dim=0)))
