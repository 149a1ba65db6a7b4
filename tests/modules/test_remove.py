"""Views taken off again: an ordinary model, with the weights that were read."""

from __future__ import annotations

import copy

import pytest
import torch
from small import IDS, LAYERS, NOISES, Net, loss, noisy, recipe
from torch import nn

import fairseq_qn
from fairseq_qn.errors import UnsupportedError
from fairseq_qn.modules.view import views_of


@pytest.mark.parametrize("stage", [None, "emb"])
@pytest.mark.parametrize("noise", NOISES)
def test_an_ordinary_model_is_left(noise: str, stage: str | None) -> None:
    model = noisy(noise=noise)
    parameters = dict(model.named_parameters())
    fairseq_qn.freeze(model, stage)
    model.eval()
    answers, weights = model(IDS).detach(), fairseq_qn.decoded_state_dict(model)
    assert fairseq_qn.remove(model) is model and not list(views_of(model))
    assert torch.equal(model(IDS), answers)
    plain, state = Net(seed=1), model.state_dict()
    assert list(state) == list(plain.state_dict()) and repr(model) == repr(plain.eval())
    assert all(torch.equal(value, weights[key]) for key, value in state.items())
    assert all(p is parameters[name] for name, p in model.named_parameters())
    for one, other in zip(model.modules(), plain.modules(), strict=True):
        assert type(one) is type(other) and one.__dict__.keys() == other.__dict__.keys()
        assert not one._forward_pre_hooks and not one._forward_hooks
    model.train()
    loss(model).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_it_trains_on_and_takes_another_recipe() -> None:
    """A gradient that comes without any call raised while there was noise; now nothing watches."""
    model = noisy(p=0.5)
    model.block.fc1.weight.sum()  # read before any pass: watched from here
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fairseq_qn.follow(model, optimizer)
    fairseq_qn.remove(model)
    model.block.fc1.weight.sum().backward()
    optimizer.step()
    assert fairseq_qn.apply(model, recipe(scheme="integer", bits=4)).matched.keys() == {
        f"{name}.weight" for name in LAYERS
    }


def test_what_is_refused_changes_nothing() -> None:
    with pytest.raises(UnsupportedError, match="^remove: the model carries no recipe"):
        fairseq_qn.remove(Net())
    model = noisy(p=0.5)
    model.embed._qn_recipe = model._qn_recipe  # as if the recipe had been applied to it alone
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedError, match=r"^embed\.weight: is read by a module outside of this one"):
        fairseq_qn.remove(model.embed)
    assert len(list(views_of(model))) == len(LAYERS) and model.state_dict().keys() == before.keys()


def test_a_model_says_how_it_is_read() -> None:
    model = nn.Sequential(nn.Embedding(40, 8), nn.Linear(8, 6), nn.Linear(6, 4))
    rules = [
        {"layers": "0", "scheme": "product", "block_size": 4, "n_centroids": 256, "stage": "a"},
        {"layers": "1", "scheme": "integer", "bits": 3, "stage": "b"},
    ]
    fairseq_qn.apply(model, {"version": 1, "rules": rules})
    fairseq_qn.freeze(model, "a")
    assert str(model).splitlines() == [
        "Sequential(",
        "  (0): Embedding(40, 8, PQ d4 K80, frozen)",
        "  (1): Linear(in_features=8, out_features=6, bias=True, int3, float)",
        "  (2): Linear(in_features=6, out_features=4, bias=True)",
        ")",
    ]
