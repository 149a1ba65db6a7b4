"""Product quantisation: codes and codebook against slow loops, and the algebra of the projection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import DTYPES, blocks_by_hand, hostile, weights_and_block_sizes
from torch import Tensor

from fairseq_qn.errors import NonFiniteWeight
from fairseq_qn.quant import product
from fairseq_qn.quant.noise import bernoulli, replace_blocks
from fairseq_qn.quant.product import Groups

Case = tuple[Tensor, int]


def random_codes(weight: Tensor, block_size: int, k: int, seed: int) -> Tensor:
    columns = weight.numel() // weight.shape[0] // block_size
    codes = torch.randint(0, k, (weight.shape[0], columns), generator=torch.Generator().manual_seed(seed))
    return codes.to(product.codes_dtype(k))


def project_by_hand(
    weight: Tensor, codes: Tensor, block_size: int, pad: int | None = None
) -> tuple[Tensor, dict[int, Tensor]]:
    """Each block replaced by the mean of those that share its code, in fp64, and the means; element by
    element.
    """
    blocks = [[weight[index].item() for index in block] for block in blocks_by_hand(weight, block_size)]
    flat, columns = codes.flatten().tolist(), codes.shape[1]
    means = {}
    for code in set(flat):
        members = [b for i, b in enumerate(blocks) if flat[i] == code and i // columns != pad]
        if members:
            means[code] = torch.tensor(members, dtype=torch.float64).mean(0)
    result = torch.zeros(weight.shape, dtype=torch.float64)
    for i, block in enumerate(blocks_by_hand(weight, block_size)):
        for t, index in enumerate(block):
            result[index] = weight[index] if i // columns == pad else means[flat[i]][t]
    return result, means


def tolerance(weight: Tensor) -> float:
    return 1e-6 * float(weight.double().abs().max())


@given(weights_and_block_sizes(), st.integers(1, 9), st.integers(0, 999), st.data())
def test_projection_and_codebook_against_a_loop(case: Case, k: int, seed: int, data: st.DataObject) -> None:
    weight, d = case
    pad = data.draw(st.none() | st.integers(0, len(weight) - 1))
    codes = random_codes(weight, d, k, seed)
    groups = Groups.of(codes, k, pad)
    expected, means = project_by_hand(weight, codes, d, pad)
    codebook = product.codebook_of(weight, groups, d)
    assert codebook.shape == (k, d)
    for code in range(k):
        mean = means.get(code, torch.zeros(d).double())
        torch.testing.assert_close(codebook[code].double(), mean, rtol=1e-6, atol=tolerance(weight))
    found = product.project(weight, groups, d)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=tolerance(weight))
    row = None if pad is None else weight[pad]
    assert torch.equal(product.decode(codes, codebook, weight.shape, pad, row), found)
    if pad is not None:
        assert (
            torch.equal(found[pad], weight[pad])
            and not product.decode(codes, codebook, weight.shape, pad)[pad].any()
        )


@given(weights_and_block_sizes(), st.integers(1, 9), st.integers(0, 999), st.booleans())
def test_projection_is_linear_idempotent_and_self_adjoint(
    case: Case, k: int, seed: int, padded: bool
) -> None:
    x, d = case
    x = x.double()
    y = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    groups = Groups.of(random_codes(x, d, k, seed), k, 0 if padded else None)

    def project(w: Tensor) -> Tensor:
        return product.project(w, groups, d)

    close = {"rtol": 1e-6, "atol": 1e-6 * max(1.0, float(x.abs().max()))}
    torch.testing.assert_close(project(2 * x - 3 * y), 2 * project(x) - 3 * project(y), **close)
    torch.testing.assert_close(project(project(x)), project(x), **close)
    inner = [float((project(x) * y).sum()), float((x * project(y)).sum())]
    assert inner[0] == pytest.approx(inner[1], rel=1e-6, abs=1e-6 * float(x.norm() * y.norm()))


@given(weights_and_block_sizes(DTYPES), st.integers(1, 9), st.booleans())
def test_an_int8_codebook_by_hand(case: Case, k: int, padded: bool) -> None:
    """Python's own numbers: round(mean / scale) * scale, the largest mean at 127 steps."""
    weight, d = case
    groups = Groups.of(random_codes(weight, d, k, 0), k, 0 if padded else None)
    book = product.codebook_of(weight, groups, d)
    found, scale = product.to_integers(book, 8)
    step = max(max(abs(value) for value in book.flatten().tolist()) / 127, 2.0**-126)
    assert scale.item() == pytest.approx(step, rel=1e-6)
    for value, level in zip(book.flatten().tolist(), found.flatten().tolist(), strict=True):
        assert -127 <= level <= 127 and abs(value / step - level) <= 0.5 + 1e-4
    read = product.project(weight, groups, d, bits=8)
    pad = weight[0] if padded else None
    expected = product.decode(groups.codes, found.float() * scale, weight.shape, groups.padding_idx, pad)
    assert torch.equal(read, expected.to(weight.dtype)) and read.dtype == weight.dtype


@given(
    weights_and_block_sizes(DTYPES),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.4, 1.0]),
    st.integers(0, 999),
    st.data(),
)
def test_projecting_some_blocks(case: Case, k: int, p: float, seed: int, data: st.DataObject) -> None:
    weight, d = case
    pad = data.draw(st.none() | st.integers(0, len(weight) - 1))
    groups = Groups.of(random_codes(weight, d, k, seed), k, pad)
    mask, before = bernoulli(weight.numel() // d, p, seed), weight.clone()
    bits = data.draw(st.sampled_from([1, 6, 8, 16]))
    expected = replace_blocks(weight, product.project(weight, groups, d, bits), mask, d)
    found = product.project_some(weight, groups, d, mask, bits)
    assert torch.equal(found, expected) and found.dtype == weight.dtype and torch.equal(weight, before)


@given(weights_and_block_sizes(DTYPES[1:]), st.integers(1, 9), st.integers(0, 999))
def test_half_precision_is_the_fp32_result_rounded(case: Case, k: int, seed: int) -> None:
    weight, d = case
    groups = Groups.of(random_codes(weight, d, k, seed), k)
    assert product.codebook_of(weight, groups, d).dtype == torch.float32
    assert torch.equal(
        product.project(weight, groups, d), product.project(weight.float(), groups, d).to(weight.dtype)
    )


@pytest.mark.parametrize("value", [0.1, 1e4, 1e-7])
def test_the_mean_of_very_many_blocks_is_exact(value: float) -> None:
    """A plain fp32 sum of them is some per cent off."""
    weight = torch.full((20_000, 64), value)
    groups = Groups.of(torch.zeros(20_000, 16, dtype=torch.uint8), 4)
    torch.testing.assert_close(product.project(weight, groups, 4), weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 511, 512, 513])
def test_runs_of_blocks_meet_where_they_should(n: int) -> None:
    """Around the length at which a cluster is cut into runs."""
    codes = torch.cat([torch.full((n,), 2), torch.full((300,), 0), torch.tensor([5, 2])]).unsqueeze(1)
    weight = torch.randn(len(codes), 3, generator=torch.Generator().manual_seed(n))
    codebook = product.codebook_of(weight, Groups.of(codes.to(torch.uint8), 7), 3)
    for code in range(7):
        members = weight[codes[:, 0] == code].double()
        mean = members.mean(0) if len(members) else torch.zeros(3).double()
        torch.testing.assert_close(codebook[code].double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("k", "dtype", "bits"),
    [
        (2, torch.uint8, 1), (3, torch.uint8, 2), (4, torch.uint8, 2), (255, torch.uint8, 8),
        (256, torch.uint8, 8),
        (257, torch.int32, 9), (32_768, torch.int32, 15), (32_769, torch.int32, 16),
        (65_536, torch.int32, 16),
    ],
)  # fmt: skip
def test_codes_are_as_narrow_as_they_can_be(k: int, dtype: torch.dtype, bits: int) -> None:
    assert (product.codes_dtype(k), product.code_bits(k)) == (dtype, bits)
    codes = torch.tensor([[0, k - 1], [k - 1, 0]]).to(product.codes_dtype(k))
    assert codes.tolist() == [[0, k - 1], [k - 1, 0]]
    weight = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    groups = Groups.of(codes, k)
    codebook = product.codebook_of(weight, groups, 2)
    assert codebook[0].tolist() == [4, 5] and codebook[k - 1].tolist() == [4, 5]
    assert torch.equal(product.project(weight, groups, 2), torch.tensor([[4.0, 5, 4, 5], [4, 5, 4, 5]]))


@given(weights_and_block_sizes(DTYPES), st.sampled_from([2, 5, 300]), st.data())
def test_learned_codes_reconstruct(case: Case, k: int, data: st.DataObject) -> None:
    weight, d = case
    pad = data.draw(st.none() | st.integers(0, len(weight) - 1))
    if pad is not None:
        weight[pad] = 0
    clipped = product.n_codewords(weight.shape, d, k, pad)
    codes, clusters = product.learn(weight, d, k, padding_idx=pad)
    rows, columns = codes.shape
    assert codes.dtype == product.codes_dtype(k) and int(codes.max()) < clipped
    assert clipped == max(1, min(k, (rows - (pad is not None)) * columns))
    result = product.project(weight.float(), Groups.of(codes, clipped, pad), d)
    if k >= rows * columns:  # every block is its own codeword
        assert torch.equal(result, weight.float())
    error = float((weight.double() - result.double()).pow(2).sum())
    slack = 1e-9 * float(weight.double().pow(2).sum())
    assert error == pytest.approx(clusters.objective, rel=1e-2, abs=slack + 1e-30)
    if pad is not None:
        assert not codes[pad].any() and not result[pad].any()


def test_a_pad_row_that_is_not_zero_moves_no_codeword_and_stays_as_it_is() -> None:
    weight = hostile("normal", (9, 8), 1)
    codes, _ = product.learn(weight, 4, 4, padding_idx=3)
    louder = weight.clone()
    louder[3] = 1e6
    codes_louder, _ = product.learn(louder, 4, 4, padding_idx=3)
    assert torch.equal(codes, codes_louder)
    groups = Groups.of(codes, 4, 3)
    quiet, loud = product.project(weight, groups, 4), product.project(louder, groups, 4)
    assert torch.equal(loud[3], louder[3]) and torch.equal(quiet[3], weight[3])
    loud[3] = quiet[3]
    assert torch.equal(quiet, loud)


def test_a_table_that_is_nothing_but_its_pad_row() -> None:
    weight = torch.ones(1, 8)
    codes, clusters = product.learn(weight, 4, 256, padding_idx=0)
    assert product.n_codewords(weight.shape, 4, 256, 0) == 1
    assert not codes.any() and clusters.objective == 0
    assert torch.equal(product.project(weight, Groups.of(codes, 1, 0), 4), weight)


def test_the_seed_decides() -> None:
    weight = hostile("normal", (40, 40), 0)
    codes = [product.learn(weight, 4, 16, seed=seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(codes[0], codes[1]) and not torch.equal(codes[0], codes[2])


def test_nan_names_the_layer() -> None:
    weight = torch.ones(4, 4)
    weight[2, 1] = float("nan")
    with pytest.raises(NonFiniteWeight, match="^decoder.fc2.weight: 1 of 16 values"):
        product.learn(weight, 2, 2, name="decoder.fc2.weight")
