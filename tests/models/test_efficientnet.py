"""EfficientNet: as published, its recipe, its file, and what it answers to images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fairseq")

from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY, MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
from omegaconf import OmegaConf

import fairseq_qn
from fairseq_qn import hub
from fairseq_qn.cli import main
from fairseq_qn.errors import FormatError, UnsupportedError
from fairseq_qn.models.describe import checked
from fairseq_qn.models.images import prepared
from fairseq_qn.models.mbconv import STAGES, EfficientNet
from fairseq_qn.modules.match import match
from fairseq_qn.recipe import Recipe

TINY = {"width": 0.25, "depth": 0.3, "dropout": 0.0, "stochastic_depth": 0.0, "norm_momentum": 1.0}


def build(names: tuple[str, ...] = (), **model: Any) -> Any:
    task = "qn_image_classification"
    options = {"num_classes": 3, "image_size": 16, "image_channels": 1}
    dictionary = Dictionary() if names else None
    for name in names:
        dictionary.add_symbol(name)
    made = TASK_REGISTRY[task](OmegaConf.create({"_name": task, "data": "", **options}), dictionary)
    torch.manual_seed(0)
    args = OmegaConf.create({"_name": "qn_efficientnet", **TINY, **model})
    return MODEL_REGISTRY["qn_efficientnet"].build_model(args, made)


@pytest.mark.parametrize(
    ("name", "parameters", "blocks"),
    [("b0", 5_288_548, 16), ("b1", 7_794_184, 23), ("b2", 9_109_994, 23), ("b3", 12_233_232, 26)],
)
def test_sizes_are_as_published(name: str, parameters: int, blocks: int) -> None:
    """The counts of the reference networks, and the recipe takes nearly all of them."""
    args = OmegaConf.create({})
    ARCH_CONFIG_REGISTRY[f"qn_efficientnet_{name}"](args)
    with torch.device("meta"):
        model = EfficientNet(1000, width=args.width, depth=args.depth)
    assert sum(p.numel() for p in model.parameters()) == parameters and len(model.blocks) == blocks
    _, coverage = match(model, Recipe.load("efficientnet"))
    assert len(coverage.matched) == 5 * blocks - sum(b.expand is None for b in model.blocks) + 2
    assert coverage.share > 0.98 and not [n for n in coverage.left if n.endswith("v.weight")]
    assert len(STAGES) == 7


def test_stochastic_depth_and_shapes() -> None:
    torch.manual_seed(0)
    model = EfficientNet(5, 1, 0.25, 1.0, stochastic_depth=0.9)
    x = torch.randn(4, 1, 24, 40)
    assert model.eval()(x).shape == (4, 5) and torch.equal(model(x), model(x))
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters()) and not torch.equal(model(x), model(x))
    block = next(b for b in reversed(model.blocks) if b.residual)
    inputs = torch.randn(64, block.project.out_channels, 2, 2)
    passed = (block(inputs) == inputs).flatten(1).all(1).float().mean()
    assert abs(passed - block.left_out) < 0.2


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_the_file_alone_answers(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = build(("cat", "dog", "bee")), tmp_path / "m.qn.safetensors"
    rules = [{"layers": ".*project|classifier", "scheme": "integer", "bits": 4}]
    fairseq_qn.apply(model, {"version": 1, "rules": rules}, seed=0)
    model.train()(torch.randn(8, 1, 16, 16))  # else statistics are not those of its inputs, and answers 0
    fairseq_qn.freeze(model.eval())
    size = fairseq_qn.predict_size(model, parts="float32")
    assert size == fairseq_qn.save(model, path, parts="float32").total
    found = hub.load_interface(path, mode)
    assert main(["predict", str(path), "a sentence"]) == 1
    assert "expected a model of sentences, found one of images" in capsys.readouterr().err
    images = np.random.default_rng(0).integers(0, 256, (5, 20, 12, 1), dtype=np.uint8)
    with torch.no_grad():
        expected = model(prepared(torch.from_numpy(images), 16))
    torch.testing.assert_close(found.logits(torch.from_numpy(images), batch=2), expected)
    many = found.classify(images)
    assert expected.std(0).max() > 0.01
    assert [answer[0][0] for answer in many] == [("cat", "dog", "bee")[i] for i in expected.argmax(1)]
    assert all(abs(sum(p for _, p in answer) - 1) < 1e-5 for answer in many)
    for one in (images[0], images[0, ..., 0], torch.from_numpy(images[0])):
        assert [name for name, _ in found.classify(one)] == [name for name, _ in many[0]]
    assert len(found.classify(images[..., 0])) == 5 and found.classify(images[:0]) == []
    for bad in (
        images.astype(np.float32),
        images[None],
        images[0, 0, 0],
        np.zeros((0, 0, 0, 1), "u1"),
    ):
        with pytest.raises(UnsupportedError, match=r"classify: expected uint8 \[height, width, 1\]"):
            found.classify(bad)


def test_images_are_brought_to_one_size() -> None:
    images = torch.arange(2 * 3 * 4 * 3, dtype=torch.uint8).view(2, 3, 4, 3)
    assert prepared(images, 8).shape == (2, 3, 8, 8)
    same = prepared(images[:, :, :3], 3)
    assert torch.equal(((same + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1), images[:, :, :3])


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("model", "width", 1000), ("model", "depth", "__import__('os')"), ("model", "dropout", 2.0),
        ("task", "num_classes", 10**9), ("task", "image_size", 10**6), ("task", "image_channels", -1),
    ],
)  # fmt: skip
def test_options_of_a_file_are_checked(part: str, name: str, value: Any) -> None:
    source, _ = build().qn_describe()
    source[part][name] = value
    with pytest.raises(FormatError, match=f"source.{part}.{name}: expected"):
        checked(source)
