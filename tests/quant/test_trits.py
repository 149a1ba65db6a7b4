"""Ternary digits: every count round-trips, five to a byte; what is no such thing is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_qn.errors import EncodeError, FormatError
from fairseq_qn.quant.trits import pack_trits, trit_bytes, unpack_trits


@given(st.lists(st.integers(0, 2), max_size=40))
def test_round_trip(digits: list[int]) -> None:
    packed = pack_trits(torch.tensor(digits, dtype=torch.uint8))
    assert packed.dtype == torch.uint8 and len(packed) == trit_bytes(len(digits)) == -(-len(digits) // 5)
    assert unpack_trits(packed, len(digits)).tolist() == digits
    for i, byte in enumerate(packed.tolist()):
        assert byte == sum(digit * 3**j for j, digit in enumerate(digits[5 * i : 5 * i + 5]))


def test_all_bytes() -> None:
    every = torch.arange(243, dtype=torch.uint8)
    assert torch.equal(pack_trits(unpack_trits(every, 5 * 243)), every)


@pytest.mark.parametrize(
    ("packed", "n", "match"),
    [
        ([243], 5, "bytes below 243, found 243"),
        ([9], 2, "zeros after 2"),
        ([0, 0], 5, r"uint8 \[1\]"),
        ([], 1, r"uint8 \[1\]"),
    ],
)
def test_damage_is_refused(packed: list[int], n: int, match: str) -> None:
    with pytest.raises(FormatError, match=f"^ternary digits: expected {match}"):
        unpack_trits(torch.tensor(packed, dtype=torch.uint8), n)


@pytest.mark.parametrize("value", [-1, 3])
def test_other_digits_are_refused(value: int) -> None:
    with pytest.raises(EncodeError, match="^pack: expected digits 0 to 2, found"):
        pack_trits(torch.tensor([0, value]))
