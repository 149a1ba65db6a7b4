"""State dicts of other recipes: what is not frozen gives way, what is frozen fits or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import IDS, Net, recipe
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn.errors import MismatchError
from fairseq_qn.modules.adopt import adopt
from fairseq_qn.modules.view import CODED, FROZEN, views_of


def viewed(*names: str, seed: int = 0, **rule: Any) -> Net:
    model = Net(seed).eval()
    fairseq_qn.apply(model, recipe(*names, **rule))
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def load(model: nn.Module, state: dict[str, Tensor]) -> None:
    adopt(state, views_of(model))
    model.load_state_dict(state)


def test_a_dense_checkpoint_loads_strictly() -> None:
    model = viewed()
    load(model, state_of(Net(3)))
    assert torch.equal(model(IDS), Net(3).eval()(IDS))
    assert all(view.phase == 0 for view in views_of(model))


def test_a_dense_checkpoint_makes_a_frozen_model_keep_its_codes_and_phase() -> None:
    model = viewed()
    fairseq_qn.freeze(model)
    codes = {view.name: view.buffer("codes").clone() for view in views_of(model)}
    load(model, state_of(Net(3)))
    assert all(
        torch.equal(view.buffer("codes"), codes[view.name]) and view.phase == FROZEN
        for view in views_of(model)
    )


@pytest.mark.parametrize("phase", ["float", "coded", "frozen"])
def test_a_checkpoint_of_the_same_recipe_is_not_touched(phase: str) -> None:
    source, target = (viewed(kind="exact", p=0.5, seed=seed) for seed in (0, 1))
    if phase == "coded":
        fairseq_qn.refresh(source)
    elif phase == "frozen":
        fairseq_qn.freeze(source)
    state = state_of(source)
    adopt(state, views_of(target))
    assert state.keys() == source.state_dict().keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in source.state_dict().items())
    target.load_state_dict(state)
    assert torch.equal(target(IDS), source(IDS))


OTHER = {
    "block_size": {"block_size": 1},
    "dtype": {"k": 300, "block_size": 1},
    "fewer": {"k": 2},
    "scheme": {"scheme": "integer", "bits": 4},
}


@pytest.mark.parametrize("other", OTHER)
def test_a_frozen_layer_of_another_recipe_is_refused_by_name(other: str) -> None:
    source = viewed("block.fc1", k=9)
    fairseq_qn.freeze(source)
    model = viewed("block.fc1", **({"k": 9} | OTHER[other]))
    before = state_of(model)
    words = {"scheme": "quantised by another scheme", "fewer": "expected codes below 2, found 0 to 8"}.get(
        other, r"expected torch\."
    )
    with pytest.raises(
        MismatchError,
        match=rf"^block\.fc1\.weight: frozen in the checkpoint, but .*{words}.*use the recipe of",
    ):
        load(model, state_of(source))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("other", OTHER)
@pytest.mark.parametrize("phase", ["float", "coded"])
def test_what_is_not_frozen_gives_way(other: str, phase: str) -> None:
    source = viewed(k=9, kind="exact", p=0.5, seed=2)
    if phase == "coded":
        fairseq_qn.refresh(source)
    model = viewed(**({"k": 9} | OTHER[other]))
    load(model, state_of(source))
    assert torch.equal(model(IDS), Net(2).eval()(IDS))
    fairseq_qn.freeze(model)
    if other == "scheme":
        return
    assert all(int(view.buffer("codes").max()) < view.scheme.n_codewords(view) for view in views_of(model))


def test_integers_become_blocks_unless_they_are_frozen() -> None:
    source = viewed("block.fc1", scheme="integer")
    load(viewed("block.fc1"), state_of(source))
    fairseq_qn.freeze(source)
    with pytest.raises(
        MismatchError, match=r"^block\.fc1\.weight: frozen in the checkpoint, but its codes are missing"
    ):
        load(viewed("block.fc1"), state_of(source))


def test_layers_without_a_rule_here_lose_their_codes_unless_frozen() -> None:
    source = viewed(kind="exact", p=0.5)
    fairseq_qn.refresh(source)
    assert all(view.phase == CODED for view in views_of(source))
    model = viewed("block.fc1")
    load(model, state_of(source))
    plain = Net()
    state = state_of(source)
    adopt(state, [])
    plain.load_state_dict(state)
    fairseq_qn.freeze(source, "conv")
    for other in (model, plain):
        with pytest.raises(
            MismatchError,
            match=r"^(conv|mix)\.weight: frozen in the checkpoint, but the recipe gives it no rule",
        ):
            load(other, state_of(source))


class Oscillator(nn.Module):
    def __init__(self, phase: Tensor) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.ones(3)), nn.Linear(4, 4)
        self.register_buffer("phase", phase)


@pytest.mark.parametrize("phase", [torch.zeros(3), torch.zeros(()), torch.zeros(3).byte()])
def test_a_phase_that_is_no_views_is_left_alone(phase: Tensor) -> None:
    model = Oscillator(phase)
    fairseq_qn.apply(
        model, {"version": 1, "rules": [{"layers": "inner", "scheme": "product", "block_size": 2}]}
    )
    state = state_of(Oscillator(phase))
    load(model, state)
    assert "phase" in state and "inner.phase" in state


class Twice(nn.Module):
    """One table under two names, as fairseq shares all embeddings of a translation model."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Module(), nn.Module()
        self.encoder.embed_tokens = self.decoder.embed_tokens = nn.Embedding(12, 8)


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_a_module_under_two_names(name: str) -> None:
    rule = {"layers": rf"{name}\.embed_tokens", "scheme": "product", "block_size": 4, "n_centroids": 3}
    model = Twice()
    fairseq_qn.apply(model, {"version": 1, "rules": [rule]})
    (view,) = views_of(model)
    assert view.keys == ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    dense = Twice()
    load(model, state_of(dense))
    assert torch.equal(model.decoder.embed_tokens.weight, dense.encoder.embed_tokens.weight)
    fairseq_qn.freeze(model)
    with pytest.raises(MismatchError, match="embed_tokens.weight: frozen in the checkpoint"):
        load(dense, state_of(model))
