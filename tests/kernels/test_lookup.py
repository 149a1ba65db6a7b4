"""The compiled product with codes against the plain torch code that defines it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fairseq_qn.kernels import lookup, native
from fairseq_qn.quant.product import decode

needs_kernel = pytest.mark.skipif(
    native.library() is None, reason="the kernel was not compiled at installation"
)
ROWS = [1, 2, 4, 5, 8, 9, 16, 17, 40, 67]


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def layer(seed: int, out: int, groups: int, d: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """codes, codebook and bias; the first and the last codeword are used."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, k, (out, groups), generator=generator, dtype=torch.uint8)
    codes[0, 0], codes[-1, -1] = 0, k - 1
    return codes, torch.randn(k, d, generator=generator), torch.randn(out, generator=generator)


def rows(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@needs_kernel
@settings(max_examples=80, deadline=None)
@given(
    st.integers(0, 2**31), st.sampled_from(ROWS), st.integers(1, 70), st.integers(1, 20),
    st.sampled_from([1, 2, 3, 4, 7, 8, 16, 64]), st.sampled_from([1, 2, 3, 16, 255, 256]), st.booleans(),
)  # fmt: skip
def test_the_product_is_that_of_the_decoded_weight(
    seed: int, n: int, out: int, groups: int, d: int, k: int, with_bias: bool
) -> None:
    codes, codebook, bias = layer(seed, out, groups, d, k)
    x = rows(seed + 1, n, groups * d)
    found = lookup.linear(x, codes, codebook, bias if with_bias else None)
    weight = decode(codes, codebook, (out, groups * d)).double()
    expected = F.linear(x.double(), weight, bias.double() if with_bias else None)
    # what rounding is relative to
    largest = F.linear(x.double().abs(), weight.abs()).amax() + bias.abs().max()
    assert found.shape == expected.shape and found.dtype == torch.float32
    assert (found - expected).abs().max() <= 2**-22 * largest


@needs_kernel
@pytest.mark.parametrize("n", ROWS)
def test_a_row_is_the_same_whatever_else_is_in_the_batch(n: int) -> None:
    codes, codebook, bias = layer(0, 50, 21, 8, 256)
    x = rows(1, n, 168)
    together = lookup.linear(x, codes, codebook, bias)
    for i in range(n):
        assert torch.equal(lookup.linear(x[i : i + 1], codes, codebook, bias)[0], together[i])


@needs_kernel
@pytest.mark.parametrize("n", [3, 8, 40])
def test_the_number_of_threads_changes_nothing(n: int, restore_threads: None) -> None:
    codes, codebook, bias = layer(0, 9_000, 5, 4, 256)
    x, answers = rows(1, n, 20), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        answers.append(lookup.linear(x, codes, codebook, bias))
    assert all(torch.equal(answer, answers[0]) for answer in answers)


@needs_kernel
def test_any_shape_and_stride() -> None:
    codes, codebook, bias = layer(0, 30, 6, 4, 100)
    weight = decode(codes, codebook, (30, 24))
    for x in (rows(1, 24), rows(1, 0, 24), rows(1, 2, 3, 24), rows(1, 24, 5).t(), rows(1, 5, 48)[:, ::2]):
        torch.testing.assert_close(lookup.linear(x, codes, codebook, bias), F.linear(x, weight, bias))
    sliced = lookup.linear(rows(1, 24), codes.t().contiguous().t(), codebook.t().contiguous().t(), bias)
    assert torch.equal(sliced, lookup.linear(rows(1, 24), codes, codebook, bias))


@needs_kernel
def test_values_that_are_not_finite_stay_in_their_row() -> None:
    codes, codebook, bias = layer(0, 30, 6, 4, 100)
    x = rows(1, 20, 24)
    x[3, 5], x[7, 0] = float("nan"), float("inf")
    y = lookup.linear(x, codes, codebook, bias)
    assert y[3].isnan().all() and not y[7].isfinite().any()
    keep = [i for i in range(20) if i not in (3, 7)]
    assert torch.equal(y[keep], lookup.linear(x[keep], codes, codebook, bias))


@needs_kernel
def test_a_code_beyond_the_codebook_spoils_its_own_output_only() -> None:
    codes, codebook, bias = layer(0, 30, 6, 4, 3)
    x = rows(1, 20, 24)
    expected = lookup.linear(x, codes, codebook, bias)
    codes[7] = 255
    found = lookup.linear(x, codes, codebook, bias)
    keep = [i for i in range(30) if i != 7]
    assert torch.equal(found[:, keep], expected[:, keep])


def test_what_the_kernel_does_not_take() -> None:
    codes, codebook, _ = layer(0, 30, 6, 4, 100)
    assert lookup.usable(codes, codebook) is (native.library() is not None)
    assert not lookup.usable(codes.int(), codebook)
    assert not lookup.usable(codes, codebook.double())
    assert not lookup.usable(codes, torch.zeros(100, 65))
    assert not lookup.usable(codes.to("meta"), codebook)
