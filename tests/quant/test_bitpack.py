"""Laws of bit packing: codes come back, the layout is the documented one, and nothing else is accepted."""

from __future__ import annotations

import doctest
import hashlib
import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairseq_qn.errors import EncodeError, FormatError, QNError
from fairseq_qn.quant import bitpack
from fairseq_qn.quant.bitpack import pack, packed_bytes, unpack

WIDTHS = range(1, 17)
# The sha256 of `test_golden_bytes`. GENERATE_EXPECTED=1 shows a new one, to paste after a change on purpose.
EXPECTED = "5726a89366ad12cd9d26f40a798ba55b5197b1b7a32114612b90583ac91da28a"


@st.composite
def codes_of_width(draw: st.DrawFn) -> tuple[list[int], int]:
    bits = draw(st.integers(1, 16))
    return draw(st.lists(st.integers(0, 2**bits - 1), max_size=70)), bits


def by_hand(values: list[int], bits: int) -> bytes:
    """The layout, written a second time as one large integer."""
    stream = sum(value << (bits * i) for i, value in enumerate(values))
    return stream.to_bytes(-(-len(values) * bits // 8), "little")


def test_doctests_run() -> None:
    result = doctest.testmod(bitpack)
    assert result.attempted >= 5 and result.failed == 0


@given(codes_of_width(), st.sampled_from([torch.int32, torch.int64, torch.uint16]))
def test_layout_and_round_trip(case: tuple[list[int], int], dtype: torch.dtype) -> None:
    values, bits = case
    packed = pack(torch.tensor(values, dtype=dtype), bits)
    assert packed.dtype == torch.uint8 and packed.shape == (packed_bytes(len(values), bits),)
    assert bytes(packed.tolist()) == by_hand(values, bits)
    back = unpack(packed, bits, len(values))
    assert back.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert back.tolist() == values


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_chunks_join(bits: int, extra: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that fill several chunks, to a code less and a code more, give the bytes of one chunk."""
    values = torch.from_numpy(np.random.default_rng(bits).integers(0, 1 << bits, 3 * 64 + extra))
    whole = pack(values, bits)
    monkeypatch.setattr(bitpack, "_CHUNK", 64)
    assert torch.equal(pack(values, bits), whole)
    assert torch.equal(unpack(whole, bits, len(values)).long(), values)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]
)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 1, 3)])
def test_any_integer_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 32, shape)).to(dtype)
    for bits in (5, 8, 16):
        assert torch.equal(unpack(pack(values, bits), bits, values.numel()).to(dtype).reshape(shape), values)


@pytest.mark.parametrize("bits", [5, 8, 16])
def test_strided_views(bits: int) -> None:
    values = torch.arange(24).reshape(4, 6)
    assert unpack(pack(values.T, bits), bits, 24).tolist() == values.T.reshape(-1).tolist()
    # starts at an odd address
    packed = torch.cat([torch.zeros(1, dtype=torch.uint8), pack(values, bits)])[1:]
    assert unpack(packed, bits, 24).tolist() == values.reshape(-1).tolist()
    assert unpack(packed.repeat_interleave(2)[::2], bits, 24).tolist() == values.reshape(-1).tolist()


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_outside_the_width_are_refused(bits: int) -> None:
    top = (1 << bits) - 1
    assert unpack(pack(torch.tensor([0, top]), bits), bits, 2).tolist() == [0, top]
    for wrong in (-1, top + 1, 2**40):
        with pytest.raises(EncodeError, match="expected codes in") as error:
            pack(torch.tensor([0, wrong, 0]), bits)
        assert isinstance(error.value, ValueError) and str(wrong) in str(error.value)


@pytest.mark.parametrize("bits", [0, 17, -1, 3.0, True])
def test_widths_outside_1_to_16_are_refused(bits: int) -> None:
    with pytest.raises(EncodeError, match="expected bits"):
        pack(torch.tensor([0]), bits)
    with pytest.raises(FormatError, match="expected bits"):
        unpack(torch.zeros(1, dtype=torch.uint8), bits, 1)


def test_only_integers_are_packed() -> None:
    for values in (torch.tensor([1.0]), torch.tensor([1j])):
        with pytest.raises(EncodeError, match="integer"):
            pack(values, 4)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n", [1, 7, 8, 1000])
def test_wrong_length_is_refused(bits: int, n: int) -> None:
    size = packed_bytes(n, bits)
    for wrong in {0, size - 1, size + 1} - {size}:
        with pytest.raises(FormatError, match="expected uint8"):
            unpack(torch.zeros(wrong, dtype=torch.uint8), bits, n)


@pytest.mark.parametrize("n", [-1, 1.0, 10**12, 2**70])
def test_counts_that_lie_are_refused_before_any_allocation(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = torch.zeros(3, dtype=torch.uint8)
    monkeypatch.setattr(np, "empty", lambda *_: pytest.fail("allocated"))
    for bits in WIDTHS:
        with pytest.raises(FormatError):
            unpack(packed, bits, n)


@pytest.mark.parametrize(
    "packed", [torch.zeros(3), torch.zeros(3, dtype=torch.int8), torch.zeros(1, 3, dtype=torch.uint8)]
)
def test_only_flat_bytes_are_unpacked(packed: torch.Tensor) -> None:
    with pytest.raises(FormatError, match="expected uint8"):
        unpack(packed, 8, 3)


@given(codes_of_width())
def test_every_padding_bit_is_checked(case: tuple[list[int], int]) -> None:
    values, bits = case
    packed = pack(torch.tensor(values, dtype=torch.int64), bits)
    used = len(values) * bits % 8
    for bit in range(used, 8) if used else ():
        damaged = packed.clone()
        damaged[-1] |= 1 << bit
        with pytest.raises(FormatError, match="zero bits"):
            unpack(damaged, bits, len(values))


def test_messages_are_one_line_of_the_named_family() -> None:
    for call in (
        lambda: pack(torch.tensor([9]), 3),
        lambda: unpack(torch.zeros(2, dtype=torch.uint8), 3, 1),
    ):
        with pytest.raises(QNError) as error:
            call()
        assert (
            "\n" not in str(error.value) and "expected" in str(error.value) and "found" in str(error.value)
        )


def test_golden_bytes() -> None:
    """The layout never drifts: 1,001 fixed codes at each width, by hash."""
    digest = hashlib.sha256()
    for bits in WIDTHS:
        values = torch.tensor([(i * i * 2654435761 >> 7) % (1 << bits) for i in range(1001)])
        digest.update(bytes(pack(values, bits).tolist()))
    if os.environ.get("GENERATE_EXPECTED"):
        pytest.skip(f"EXPECTED = {digest.hexdigest()!r}")
    assert digest.hexdigest() == EXPECTED
