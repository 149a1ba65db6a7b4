"""Whole kernels as codewords: sizes by hand, codebooks of every width, schemes side by side."""

from __future__ import annotations

from math import ceil, log2
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import MODES
from strategies import weights
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn.artifact import container
from fairseq_qn.errors import FormatError
from fairseq_qn.modules.packed import Packed
from fairseq_qn.modules.view import views_of


def applied(model: nn.Module, *rules: dict[str, Any], **noise: Any) -> nn.Module:
    fairseq_qn.apply(model, {"version": 1, "rules": [*rules], **({"noise": noise} if noise else {})}, seed=0)
    return model


def kernel(layers: str = ".*", k: int = 512, bits: int = 6) -> dict[str, Any]:
    return {"layers": layers, "scheme": "kernel", "n_centroids": k, "codebook_bits": bits}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(20, 6, 3, 3), (20, 6, 5, 5), (20, 1, 3, 3), (20, 6, 1, 1)], ids=str)
def test_codebooks_of_every_width(bits: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    """A kernel takes log2 K bits, an element of the codebook `bits`, and is read as it is stored."""
    torch.manual_seed(0)
    outputs, inputs, height, width = shape
    groups = 20 if inputs == 1 else 1

    def made() -> nn.Module:
        return nn.Conv2d(inputs * groups, outputs, (height, width), groups=groups, bias=False)

    model = applied(made(), kernel(k=11, bits=bits))
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, tmp_path / "m")
    tensors, manifest = container.read(tmp_path / "m")
    assert tensors["weight/codes"].numel() == ceil(outputs * inputs * ceil(log2(11)) / 8)
    book = tensors["weight/codebook"]
    assert book.numel() * book.element_size() == ceil(11 * height * width * bits / 8)
    read = model.weight.detach()
    levels = read / manifest["layers"]["weight"]["scale"]
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
    assert float(levels.abs().max().round()) == max(1, 2 ** (bits - 1) - 1)
    assert len(read.reshape(-1, height * width).unique(dim=0)) <= 11
    if bits == 1:  # the mean size has the least square error
        (view,) = views_of(model)
        mean = view.scheme.codebook(view.matrix, view).abs().mean()
        assert manifest["layers"]["weight"]["scale"] == pytest.approx(float(mean), rel=1e-6)
    for mode in MODES:
        loaded = fairseq_qn.load(tmp_path / "m", mode, made())
        assert torch.equal(loaded.decoded() if mode == "packed" else loaded.weight, read)


@given(
    weights(shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.just(3), st.just(3))), st.integers(1, 8)
)
@settings(max_examples=40)
def test_hostile_weights_round_trip(w: Tensor, bits: int) -> None:
    layer = nn.Conv2d(w.shape[1], w.shape[0], 3, bias=False)
    layer.weight.data.copy_(w)
    applied(layer, kernel(k=4, bits=bits))
    fairseq_qn.freeze(layer)
    (view,) = views_of(layer)
    if not view.scheme.finite(view.matrix, view):
        return  # refused by save
    entry, parts = view.scheme.encode(view.matrix, view, torch.float16)
    assert view.scheme.check_entry(entry) is None
    assert torch.equal(view.scheme.decode(entry, parts).dense(), view.quantized())


def test_training_reads_means_and_moves_them_straight_through() -> None:
    torch.manual_seed(0)
    layer = applied(nn.Conv2d(4, 8, 3, bias=False), kernel(k=5))
    fairseq_qn.freeze(layer)
    (view,) = views_of(layer)
    codes, upstream = view.buffer("codes").flatten().long(), torch.randn(8, 4, 3, 3)
    (layer.weight * upstream).sum().backward()
    found, given_ = (t.reshape(-1, 9) for t in (layer.get_parameter("weight").grad, upstream))
    blocks, read = (
        layer.get_parameter("weight").detach().reshape(-1, 9),
        layer.weight.detach().reshape(-1, 9),
    )
    scale = max(float(blocks[codes == k].mean(0).abs().max()) for k in range(5)) / 31
    for k in range(5):
        own = codes == k
        torch.testing.assert_close(found[own], given_[own].mean(0).expand_as(found[own]))
        expected = (blocks[own].mean(0) / scale).round() * scale
        torch.testing.assert_close(read[own], expected.expand_as(read[own]))


def test_digits_without_a_meaning_are_refused() -> None:
    layer = applied(nn.Conv2d(4, 8, 3, bias=False), kernel(k=5, bits=4))
    fairseq_qn.freeze(layer)
    (view,) = views_of(layer)
    entry, parts = view.scheme.encode(view.matrix, view, torch.float16)
    parts["codebook"][0] = 0
    with pytest.raises(FormatError, match="^expected a codebook of -7 to 7, found -8; the file is damaged"):
        view.scheme.decode(entry, parts)
    assert view.scheme.check_entry({**entry, "exponent": 0, "scale": None}) is not None
    del entry["scale"]
    assert view.scheme.check_entry({**entry, "exponent": 0}) is not None, "integers have a scale"


class ConvNet(nn.Module):
    """3x3, depthwise, 1x1, a classifier."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(torch.relu(self.depthwise(torch.relu(self.stem(x)))))
        return self.classifier(torch.relu(x).mean((2, 3)))


LAYERS = {"stem": 9, "depthwise": 9, "pointwise": 4, "classifier": 4}  # size of a block of product
SCHEMES: dict[str, dict[str, Any]] = {
    "product": {"n_centroids": 6},
    "integer": {"bits": 4},
    "learned_bits": {"granularity": "channel"},
    "kernel": {"n_centroids": 6},
}


@pytest.mark.parametrize("first", SCHEMES)
@pytest.mark.parametrize("second", SCHEMES)
def test_all_schemes_of_convolutions_together(first: str, second: str, tmp_path: Path) -> None:
    """Each pair side by side: 3x3 and 1x1 by one, depthwise and the classifier by the other."""
    rules = []
    for i, (name, d) in enumerate(LAYERS.items()):
        scheme = (first, second)[i % 2]
        block = {"block_size": d} if scheme == "product" else {}
        rules.append({"layers": name, "scheme": scheme, **SCHEMES[scheme], **block})
    model, x = applied(ConvNet(), *rules, kind="proxy", p=0.5).train(), torch.randn(2, 3, 6, 6)
    model(x).square().mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in model.parameters())
    fairseq_qn.freeze(model)
    expected = model.eval()(x).detach()
    predicted = fairseq_qn.predict_size(model, parts="float32")
    assert predicted == fairseq_qn.save(model, tmp_path / "m", parts="float32").total
    for mode in MODES:
        loaded = fairseq_qn.load(tmp_path / "m", mode, ConvNet(seed=1))
        assert sum(isinstance(m, Packed) for m in loaded.modules()) == len(LAYERS) * (mode == "packed")
        torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)
