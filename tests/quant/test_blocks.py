"""The layout of blocks, against its definition written out index by index."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from strategies import DTYPES, blocks_by_hand, shapes_and_block_sizes, weights_and_block_sizes

from fairseq_qn.errors import BlockSizeError
from fairseq_qn.quant.blocks import check_block_size, codes_shape, from_blocks, to_blocks


@given(weights_and_block_sizes(DTYPES))
def test_round_trip(case: tuple[torch.Tensor, int]) -> None:
    weight, block_size = case
    blocks = to_blocks(weight, block_size)
    assert blocks.shape == (weight.numel() // block_size, block_size) and blocks.dtype == weight.dtype
    assert torch.equal(from_blocks(blocks, weight.shape), weight)


@given(shapes_and_block_sizes())
def test_blocks_are_those_of_the_definition(case: tuple[tuple[int, ...], int]) -> None:
    shape, block_size = case
    weight = torch.arange(torch.Size(shape).numel()).reshape(shape)
    check_block_size(shape, block_size)
    by_hand = blocks_by_hand(weight, block_size)
    assert to_blocks(weight, block_size).tolist() == [
        [weight[index].item() for index in block] for block in by_hand
    ]
    rows, columns = codes_shape(shape, block_size)
    assert (rows, rows * columns) == (shape[0], len(by_hand))
    assert [block[0][0] for block in by_hand] == [o for o in range(rows) for _ in range(columns)]


def test_a_transposed_weight_has_the_blocks_of_its_values() -> None:
    weight = torch.arange(24.0).reshape(4, 6).t()
    assert torch.equal(to_blocks(weight, 2), to_blocks(weight.contiguous(), 2))


@pytest.mark.parametrize(
    ("shape", "block_size", "words"),
    [
        ((8, 12), 8, ["input dimension 12", "found 8", "[2, 3, 4, 6, 12]"]),
        ((8, 12), 24, ["input dimension 12", "found 24"]),
        ((8, 12, 1, 1), 5, ["input dimension 12", "found 5"]),
        ((8, 12, 3, 3), 4, ["kernel's 9 elements", "found 4"]),
        ((8, 12, 3, 3), 6, ["kernel's 9 elements", "found 6"]),
        ((8, 12, 3, 3), 45, ["45 is 5 kernels of 9", "12 input channels"]),
        ((8, 1, 3, 3), 18, ["18 is 2 kernels of 9", "1 input channels"]),
    ],
)
def test_a_size_that_does_not_fit_names_layer_and_numbers(
    shape: tuple[int, ...], block_size: int, words: list[str]
) -> None:
    with pytest.raises(BlockSizeError) as error:
        check_block_size(shape, block_size, "encoder.layers.0.fc1.weight")
    message = str(error.value)
    assert message.startswith("encoder.layers.0.fc1.weight: ") and "\n" not in message
    assert all(word in message for word in words), message
