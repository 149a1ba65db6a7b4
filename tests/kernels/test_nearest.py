"""The compiled search against the plain torch code that defines it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairseq_qn.kernels import native
from fairseq_qn.kernels import nearest as kernel
from fairseq_qn.quant import kmeans

needs_kernel = pytest.mark.skipif(
    native.library() is None, reason="the kernel was not compiled at installation"
)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows(seed: int, n: int, d: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def assign(x: torch.Tensor, codebook: torch.Tensor, width: int | None = None) -> tuple[torch.Tensor, ...]:
    points, _ = kernel.lay_out(x, torch.zeros(x.shape[1], dtype=torch.float64), 1.0)
    return kernel.assign(points, x, codebook, width)


def widths() -> list[int]:
    return [width for width in (4, 8, 16) if width <= kernel.lanes()]


@needs_kernel
@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(1, 200),
    st.sampled_from([1, 2, 3, 4, 8, 9, 16, 64]),
    st.integers(1, 70),
)
def test_no_codeword_is_nearer_than_the_one_that_the_kernel_finds(seed: int, n: int, d: int, k: int) -> None:
    x, codebook = rows(seed, n, d), rows(seed + 1, k, d)
    distances = torch.cdist(x.double(), codebook.double()).pow(2)
    for width in widths():
        codes = assign(x, codebook, width)[0]
        found = distances.gather(1, codes.long().unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(found, distances.amin(1), rtol=1e-5, atol=1e-5 * (1 + d))


@needs_kernel
def test_the_lowest_index_wins_a_tie() -> None:
    codebook = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(20, 1)
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]]).repeat(50, 1)
    for width in widths():
        assert assign(x, codebook, width)[0].tolist() == [1, 0, 0] * 50


@needs_kernel
def test_codes_and_sums_do_not_depend_on_the_number_of_threads(one_thread: None) -> None:
    x, codebook = rows(0, 40_007, 8), rows(1, 100, 8)
    torch.set_num_threads(3)
    codes, sums, counts = assign(x, codebook)
    torch.set_num_threads(1)
    again = assign(x, codebook)
    assert torch.equal(again[0], codes) and torch.equal(again[1], sums) and torch.equal(again[2], counts)
    assert counts.sum() == len(x)


@needs_kernel
@pytest.mark.parametrize("n", [30_000, 200_000])  # the second is many enough to start from a sample
def test_kmeans_does_not_depend_on_the_number_of_threads(one_thread: None, n: int) -> None:
    x, runs = rows(0, n, 4), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(kmeans.kmeans(x, 64, iterations=3))
    for run in runs[1:]:
        assert torch.equal(run.codes, runs[0].codes) and torch.equal(run.codebook, runs[0].codebook)
        assert run.history == runs[0].history


@needs_kernel
@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 5_000])
@pytest.mark.parametrize("d", [1, 4, 8, 9])
def test_sums_of_a_search_are_those_of_its_codes(n: int, d: int) -> None:
    x, codebook = rows(0, n, d) + 100, rows(1, 7, d) + 100
    codes, sums, counts = assign(x, codebook)
    expected = torch.zeros(7, d, dtype=torch.float64).index_add_(0, codes.long(), x.double())
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-9)
    assert torch.equal(counts, torch.bincount(codes, minlength=7))


@needs_kernel
@pytest.mark.parametrize("n", [1, 64, 1_000])
def test_points_are_centred_and_scaled_in_tiles(n: int) -> None:
    x, shift = rows(0, n, 3), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    points, energy = kernel.lay_out(x, shift, 4.0)
    expected = (x.double() - shift) / 4
    laid = points.transpose(1, 2).reshape(-1, 3)
    assert torch.equal(laid[:n], expected.float()) and not laid[n:].any()
    assert energy == pytest.approx(16 * float(expected.square().sum()))


@needs_kernel
def test_sums_are_those_of_index_add() -> None:
    x, codes = rows(0, 10_001, 5), torch.randint(0, 37, (10_001,), dtype=torch.int32)
    sums, counts = kernel.accumulate(x, codes, 37)
    expected = torch.zeros(37, 5, dtype=torch.float64).index_add_(0, codes.long(), x.double())
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=1e-9)
    assert torch.equal(counts, torch.bincount(codes, minlength=37))


@needs_kernel
def test_rows_that_are_not_contiguous() -> None:
    x, codebook = rows(0, 300, 16)[:, ::2], rows(1, 20, 16)[:, 8:]
    found = kmeans.kmeans(x, 20, iterations=1, start=codebook)
    again = kmeans.kmeans(x.contiguous(), 20, iterations=1, start=codebook.contiguous())
    assert torch.equal(found.codes, again.codes) and torch.equal(found.codebook, again.codebook)


def test_everything_works_without_the_kernel(plain: None) -> None:
    x = rows(0, 2_000, 8)
    assert not kernel.usable(x)
    without = kmeans.kmeans(x, 16, iterations=5)
    assert without.objective < float((x - x.mean(0)).pow(2).sum())


@needs_kernel
def test_kmeans_is_as_good_with_the_kernel_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(0, 5_000, 8)
    fast = kmeans.kmeans(x, 64)
    monkeypatch.setattr(native, "library", lambda: None)
    assert abs(fast.objective / kmeans.kmeans(x, 64).objective - 1) < 1e-3
