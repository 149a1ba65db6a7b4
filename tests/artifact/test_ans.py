"""Entropy coding of packed codes: round trips, sizes, damage, and what lies in a file that uses it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fairseq_qn
from fairseq_qn.artifact.ans import Ans
from fairseq_qn.errors import FormatError, QNError, UnsupportedError
from fairseq_qn.quant.bitpack import pack

RECIPE = {"version": 1, "rules": [{"layers": "0", "scheme": "integer", "bits": 4, "granularity": "tensor"}]}


def tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@given(st.integers(1, 8), st.binary(min_size=1, max_size=300), st.booleans())
def test_round_trip(bits: int, data: bytes, same: bool) -> None:
    values = torch.tensor([data[0]] * len(data) if same else list(data)) % (1 << bits)
    raw = pack(values, bits)
    assert torch.equal(Ans().decode(Ans().encode(raw, bits), len(raw), bits), raw)


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_size_is_the_entropy(bits: int) -> None:
    draw = np.random.default_rng(bits)
    top = (1 << bits) - 1
    codes = np.clip(np.rint(draw.normal(top / 2, top / 8 + 0.1, 200_000)), 0, top).astype(np.uint8)
    shares = np.bincount(codes) / len(codes)
    entropy = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() * len(codes) / 8
    found = len(Ans().encode(pack(torch.from_numpy(codes), bits), bits)) - (2 << bits)
    assert entropy <= found <= 1.001 * entropy + 8


def test_the_stream_stays_as_it_is() -> None:
    raw = pack(torch.tensor([0, 1, 1, 2, 3, 1, 1, 1]), 2)
    written = "0020ff9f00200020cae51fe901000000"
    assert bytes(Ans().encode(raw, 2).tolist()).hex() == written
    assert torch.equal(Ans().decode(tensor(bytes.fromhex(written)), 2, 2), raw)


@given(st.binary(max_size=80), st.integers(1, 8), st.integers(0, 100))
def test_any_bytes_are_codes_or_refused(data: bytes, bits: int, size: int) -> None:
    try:
        found = Ans().decode(tensor(data) if data else torch.empty(0, dtype=torch.uint8), size, bits)
    except FormatError:
        return
    assert found.shape == (size,)


def test_long_codes_and_none_stay() -> None:
    raw = torch.zeros(100, dtype=torch.uint8)
    assert Ans().encode(raw, 9) is raw
    assert len(Ans().encode(raw[:0], 8)) == 0
    with pytest.raises(FormatError, match="expected a table"):
        Ans().decode(raw, 100, 9)


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_file(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256))
    fairseq_qn.apply(model, RECIPE)
    fairseq_qn.freeze(model)
    plain = fairseq_qn.save(model, tmp_path / "plain")
    with torch.no_grad():
        model[0].get_parameter("weight")[0, 0] = 3  # one outlier: most levels are then the same few
    plain, coded = (fairseq_qn.save(model, tmp_path / str(c), coder=c) for c in (None, "ans"))
    assert coded.total < 0.4 * plain.total
    assert coded.total <= fairseq_qn.predict_size(model, coder="ans")
    (entry,) = fairseq_qn.inspect(tmp_path / "ans")["layers"].values()
    assert entry["streams"]["levels"]["coder"] == "ans"
    x = torch.randn(3, 256)
    fresh = lambda: torch.nn.Sequential(torch.nn.Linear(256, 256))  # noqa: E731
    answers = [fairseq_qn.load(tmp_path / name, mode, fresh())(x) for name in ("None", "ans")]
    assert torch.equal(*answers)
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(FormatError, match="pip install constriction"):
        fairseq_qn.load(tmp_path / "ans", mode, fresh())
    with pytest.raises(UnsupportedError, match="pip install constriction"):
        fairseq_qn.save(model, tmp_path / "ans", coder="ans")
    assert fairseq_qn.inspect(tmp_path / "ans"), "the old file survives"


@pytest.mark.parametrize("bits", [1, 3, 5, "ternary"])
def test_levels_are_counted_one_by_one(bits: int | str, tmp_path: Path) -> None:
    """Levels of 3 bits straddle bytes, whose own counts would say little of them."""
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(256, 256))
    rule = {"layers": "0", "scheme": "integer", "bits": bits, "symmetric": True}
    fairseq_qn.apply(model, {"version": 1, "rules": [rule]})
    with torch.no_grad():
        model[0].get_parameter("weight").normal_().pow_(5)  # most of the levels are then 0
    fairseq_qn.freeze(model)
    plain, coded = (fairseq_qn.save(model, tmp_path / str(c), coder=c) for c in (None, "ans"))
    if bits in (3, 5):
        assert coded.parts["codes"] < 0.5 * plain.parts["codes"]
    fresh = torch.nn.Sequential(torch.nn.Linear(256, 256))
    found = fairseq_qn.load(tmp_path / "ans", model=fresh)[0].weight
    assert torch.equal(found, model.eval()[0].weight)


def test_kept_only_where_smaller_and_named(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(16, 16))
    fairseq_qn.apply(model, RECIPE)
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, tmp_path / "small", coder="ans")
    found = fairseq_qn.inspect(tmp_path / "small")
    assert found["version"] == 2 and "streams" not in next(iter(found["layers"].values()))
    with pytest.raises(QNError, match="coder: expected one of"):
        fairseq_qn.save(model, tmp_path / "small", coder="zip")
