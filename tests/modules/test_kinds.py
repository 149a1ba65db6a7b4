"""A file is for the model that it was saved from: its ties, classes and options, not only its shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forging import forge, parts, refusal
from small import MODES, Attention, Block, Net, answers, assert_answers, frozen, recipe
from torch import nn

import fairseq_qn
from fairseq_qn.errors import FormatError, MismatchError
from fairseq_qn.modules.kinds import kind_of, kinds_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kinds") / "m.qn.safetensors"
    fairseq_qn.save(frozen(), path, parts="float32")
    return path


class Other(nn.Module):
    """The tensors of Net under the same names, with another forward."""

    def __init__(self) -> None:
        super().__init__()
        for name, module in Net().named_children():
            setattr(self, name, module)


class Sub(Net):
    """A Net in all that its file can tell."""


def changed(path: str, **options: object) -> Callable[[], Net]:
    def build() -> Net:
        model = Net()
        for name, value in options.items():
            setattr(model.get_submodule(path), name, value)
        return model

    return build


STRANGERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another class": (Other, "the model: expected 'Net', as saved, found Other"),
    "eps": (
        changed("block.norm", eps=1e-12),
        "block.norm: expected LayerNorm with 'eps=1e-05', as saved, found 'eps=1e-12'",
    ),
    "padding": (
        changed("conv", padding=(0, 0)),
        "conv: expected Conv2d with 'padding=1,1', as saved, found 'padding=0,0'",
    ),
    "stride": (changed("conv", stride=(2, 2)), "conv: expected Conv2d with 'stride=1,1'"),
    "padding_mode": (
        changed("conv", padding_mode="circular"),
        "conv: expected Conv2d with 'padding_mode=zeros'",
    ),
    "pad row": (
        changed("embed", padding_idx=None),
        "embed: expected Embedding with 'padding_idx=1', as saved, found 'none'",
    ),
    "max_norm": (
        changed("embed", max_norm=1.0),
        "embed: expected Embedding with 'no more', as saved, found 'max_norm=1.0'",
    ),
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_model_of_the_same_shapes_that_would_answer_otherwise(stranger: str, saved: Path) -> None:
    build, message = STRANGERS[stranger]
    assert refusal(saved, MismatchError, build()).startswith(message)


class Chain(nn.Sequential):
    def __init__(self, *between: nn.Module) -> None:
        super().__init__(nn.Linear(8, 8), *between, nn.Linear(8, 8))


def save_a_chain(path: Path, *between: nn.Module) -> None:
    model = Chain(*between)
    fairseq_qn.apply(
        model, {"version": 1, "rules": [{"layers": "0", "scheme": "product", "n_centroids": 5}]}
    )
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, path)


def test_activations_are_told_apart(tmp_path: Path) -> None:
    save_a_chain(tmp_path / "m", nn.GELU())
    fairseq_qn.load(tmp_path / "m", model=Chain(nn.GELU()))
    for other, found in (
        (nn.ReLU(), "1: expected 'GELU', as saved, found ReLU; load the file into its own model"),
        (nn.GELU("tanh"), "1: expected GELU with 'approximate=none', as saved, found 'approximate=tanh'"),
    ):
        message = refusal(tmp_path / "m", MismatchError, Chain(other))
        assert message.startswith(found)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh())
    assert "the model: expected 'Chain', as saved, found Sequential size=4" in refusal(
        tmp_path / "m", MismatchError, model
    )
    model = Chain(nn.GELU())
    model.append(nn.Tanh())
    assert "the model: expected Chain with 'size=3'" in refusal(tmp_path / "m", MismatchError, model)


@pytest.mark.parametrize("mode", MODES)
def test_a_subclass_and_a_copy_with_other_dropout_are_the_model(mode: str, saved: Path) -> None:
    model = Sub()
    model.block.loss = nn.CrossEntropyLoss()  # what only training needs may be there or not
    assert_answers(answers(fairseq_qn.load(saved, mode, model)), answers(frozen()), mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_file_of_before_says_nothing_of_modules(mode: str, saved: Path, tmp_path: Path) -> None:
    old = forge(saved, tmp_path / "old", lambda tensors, manifest: manifest.pop("modules"))
    assert_answers(answers(fairseq_qn.load(old, mode, Net())), answers(frozen()), mode)


@pytest.mark.parametrize(
    "value", [[], "x", {"Net": ""}, {"Net": "x"}, {"Net": [1]}, {"Net": None}, {"Net": [["x"]]}]
)
def test_a_forged_list_of_modules(value: object, saved: Path, tmp_path: Path) -> None:
    path = forge(saved, tmp_path / "f", lambda tensors, manifest: manifest.update(modules=value))
    with pytest.raises(FormatError, match="modules: expected names by kind"):
        fairseq_qn.load(path, model=Net())


def test_it_is_small_and_not_there_for_a_model_that_its_file_builds(saved: Path, tmp_path: Path) -> None:
    old = forge(saved, tmp_path / "old", lambda tensors, manifest: manifest.pop("modules"))
    assert 0 < saved.stat().st_size - old.stat().st_size < 400
    model = frozen()
    fairseq_qn.save(model, tmp_path / "m", source={"builder": "mine"})
    assert "modules" not in parts(tmp_path / "m")[1]


def test_kinds_are_of_the_class_below_the_view_and_without_what_is_dropped() -> None:
    model = frozen()
    kinds = kinds_of(model, ["block.attn"])
    assert kinds == {
        k: [n for n in v if "attn" not in n] for k, v in kinds_of(Net()).items() if k != "Attention"
    }
    assert kinds["Linear"] == ["block.fc1", "block.fc2", "head"] and kinds["Block"] == ["block"]
    assert kind_of(Attention()) == "Attention" and kind_of(Block()) == "Block"
    assert kind_of(nn.MultiheadAttention(8, 2).out_proj) == "Linear"


# -- ties


def untied(net: Net) -> Net:
    net.head.weight = nn.Parameter(net.head.weight.detach().clone() + 1)
    return net


@pytest.mark.parametrize("layers", [("embed", "head"), ("block.fc1",)])
def test_an_untied_file_is_not_for_a_model_that_ties(layers: tuple[str, ...], tmp_path: Path) -> None:
    """Whether the two weights are quantised or dense."""
    model = untied(Net())
    data = recipe("block.fc1")
    data["rules"] = [
        {**data["rules"][0], "layers": name.replace(".", r"\."), "block_size": 4} for name in layers
    ]
    fairseq_qn.apply(model, data)
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, tmp_path / "m", parts="float32")
    message = refusal(tmp_path / "m", MismatchError, Net())
    assert message.startswith(
        "head.weight: expected a weight of its own, as the file has it, found one tied to embed.weight;"
    )
    for mode in MODES:
        loaded = fairseq_qn.load(tmp_path / "m", mode, untied(Net()))
        assert not torch.equal(loaded.head.weight + 0, loaded.embed.weight + 0)
        assert_answers(answers(loaded), answers(model.eval()), mode)
