"""What comes back out of a file: buffers, the pad row, tiny and huge weights, half precision; and what no
file can hold.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from forging import Manifest, Tensors, forge
from small import (
    LAYERS,
    MODES,
    PAD,
    SCHEMES,
    D,
    Net,
    answers,
    assert_answers,
    frozen,
    recipe,
    train_the_pad_row,
)
from torch import Tensor, nn
from torch.nn import functional as F

import fairseq_qn
from fairseq_qn.errors import EncodeError, NonFiniteWeight, UnsupportedError

# -- buffers


class Statistics(nn.Module):
    """Buffers of every floating dtype, whose values fp16 would round or lose."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            values = torch.tensor(
                [1 / 3, 1e-6, 12345.678] + [1e300] * (dtype == torch.float64), dtype=torch.float64
            )
            self.register_buffer(f"of_{str(dtype)[6:]}", values.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fc(x))


@pytest.mark.parametrize("mode", MODES)
def test_buffers_are_not_rounded(mode: str, tmp_path: Path) -> None:
    model = Statistics()
    torch.nn.init.uniform_(model.norm.running_var, 1e-9, 1e-8)
    model.norm.running_mean += 1e5
    fairseq_qn.apply(
        model, {"version": 1, "rules": [{"layers": "fc", "scheme": "product", "n_centroids": 3}]}
    )
    fairseq_qn.freeze(model)
    predicted = fairseq_qn.predict_size(model)
    assert fairseq_qn.save(model.eval(), tmp_path / "m").total == predicted
    loaded = fairseq_qn.load(tmp_path / "m", mode, Statistics())
    buffers = dict(loaded.named_buffers())
    for name, buffer in model.named_buffers():
        assert name.startswith("fc.") or (
            torch.equal(buffers[name], buffer) and buffers[name].dtype == buffer.dtype
        ), name


# -- the pad row


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("parts", "factor"), [("float32", 1.0), ("float16", 1.0), ("float16", 1e6), ("float16", 1e-7)]
)
def test_the_pad_row_that_a_tied_head_reads_stays_as_trained(
    mode: str, parts: str, factor: float, tmp_path: Path
) -> None:
    dense = Net(seed=1).eval()
    train_the_pad_row(dense, factor)
    model = frozen(lambda m: train_the_pad_row(m, factor))
    features = torch.randn(3, D)
    expected = F.linear(features, dense.head.weight, dense.head.bias)[:, PAD]
    assert torch.equal(F.linear(features, model.head.weight, model.head.bias)[:, PAD], expected)
    predicted = fairseq_qn.predict_size(model, parts=parts)
    size = fairseq_qn.save(model, tmp_path / "m", parts=parts)
    assert (
        size.total
        == predicted
        == sum(size.parts.values())
        == sum(size.layers.values()) + size.parts["header"]
    )
    zero = fairseq_qn.save(frozen(), tmp_path / "zero", parts=parts)
    assert size.layers["embed.weight"] == zero.layers["embed.weight"] + D * (2 if parts == "float16" else 4)
    loaded = fairseq_qn.load(tmp_path / "m", mode, Net())
    tolerance = {
        "rtol": 1e-5 if parts == "float32" else 2e-3,
        "atol": 1e-6 + factor * 1e-3 * (parts == "float16"),
    }
    found = F.linear(features, loaded.head.weight, loaded.head.bias)[:, PAD]
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(
        loaded.embed(torch.tensor([PAD, 2])), model.embed(torch.tensor([PAD, 2])), **tolerance
    )
    if parts == "float32":
        assert_answers(answers(loaded), answers(model), mode)


def test_a_table_in_half_precision_keeps_its_pad_row_packed(tmp_path: Path) -> None:
    model = frozen(train_the_pad_row)
    fairseq_qn.save(model, tmp_path / "m")
    packed = fairseq_qn.load(tmp_path / "m", "packed", Net(), dtype=torch.bfloat16)
    found, expected = packed.embed(torch.tensor([PAD, 2])), model.embed(torch.tensor([PAD, 2]))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)
    twin = copy.deepcopy(packed)
    assert torch.equal(twin.embed(torch.tensor(PAD)), found[0])


@pytest.mark.parametrize("mode", MODES)
def test_a_file_of_before_reads_its_pad_row_as_zero(mode: str, tmp_path: Path) -> None:
    """Files of earlier releases hold no pad row: their models answered with zero."""
    fairseq_qn.save(frozen(train_the_pad_row), tmp_path / "new")

    def age(tensors: Tensors, manifest: Manifest) -> None:
        del tensors["embed.weight/pad"], manifest["layers"]["embed.weight"]["pad"]

    loaded = fairseq_qn.load(forge(tmp_path / "new", tmp_path / "old", age), mode, Net())
    assert (
        not loaded.embed(torch.tensor(PAD)).any()
        and not loaded.head.weight[PAD].any()
        and loaded.embed.weight[2].any()
    )


# -- hostile values


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", ["k5", "int4"])
@pytest.mark.parametrize("factor", [1e-7, 1e-30, 3e5, 1e30])
def test_tiny_and_huge_weights_survive_fp16_parts(
    factor: float, scheme: str, mode: str, tmp_path: Path
) -> None:
    @torch.no_grad()
    def scale(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.mul_(factor)

    model = frozen(scale, **SCHEMES[scheme])
    fairseq_qn.save(model, tmp_path / "m")
    assert scheme != "k5" or fairseq_qn.inspect(tmp_path / "m")["layers"]["embed.weight"]["exponent"]
    loaded = fairseq_qn.load(tmp_path / "m", mode, Net())
    for name in [*LAYERS, "head", "block.norm"]:
        for kind in ("weight", "bias"):
            expected = getattr(model.get_submodule(name), kind, None)
            if expected is not None:
                found = getattr(loaded.get_submodule(name), kind)
                torch.testing.assert_close(
                    found + 0, expected + 0, rtol=1e-3, atol=float(expected.abs().max()) * 1e-4
                )


def test_a_model_in_half_precision(tmp_path: Path) -> None:
    model = frozen(lambda m: m.half())
    fairseq_qn.save(model, tmp_path / "m")
    for mode in MODES:
        loaded = fairseq_qn.load(tmp_path / "m", mode, Net())
        for name in LAYERS:
            weight = loaded.get_submodule(name).weight
            torch.testing.assert_close(
                weight, model.get_submodule(name).weight.float(), rtol=2e-3, atol=1e-4
            )
    halved = fairseq_qn.load(tmp_path / "m", model=Net().half())
    assert halved.embed.weight.dtype == torch.float16 and torch.equal(
        halved.embed.weight, model.embed.weight
    )


# -- refusals


def test_numbers_that_the_file_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = Net().double()
    with torch.no_grad():
        model.block.norm.weight[2] = 1e300
    fairseq_qn.apply(model, recipe())
    fairseq_qn.freeze(model)
    for parts in ("float16", "float32"):
        with pytest.raises(
            EncodeError, match=r"^block.norm.weight: expected values that fp32 holds, found 1.0e\+300; scale"
        ):
            fairseq_qn.save(model, tmp_path / "m", parts=parts)
    assert os.listdir(tmp_path) == []
    model = Net().double()
    with torch.no_grad():
        model.block.fc1.weight[0, 0] = 1e300
    fairseq_qn.apply(model, recipe())
    with pytest.raises(
        NonFiniteWeight, match=r"^block.fc1.weight: 1 of 128 weights are NaN or Inf in fp32; nothing was"
    ):
        fairseq_qn.freeze(model)
    model = nn.ModuleList([nn.Linear(8, 8, dtype=torch.complex64)])
    with pytest.raises(
        UnsupportedError, match=r"^0.weight: expected floating-point weights, found torch.complex64; keep"
    ):
        fairseq_qn.apply(model, {"version": 1, "rules": [{"layers": "0", "scheme": "product"}]})
    assert not list(model.buffers())
