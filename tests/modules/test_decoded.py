"""The weights that a network reads, as the state dict of a plain model."""

from __future__ import annotations

import copy

import pytest
import torch
from small import MODES, SCHEMES, Net, answers, frozen, recipe, train_the_pad_row
from test_api_owners import Shared
from torch import nn

import fairseq_qn
from fairseq_qn.errors import UnsupportedError


@pytest.mark.parametrize("scheme", ["k5", "k3", "int4", "group"])
def test_a_plain_model_answers_as_the_frozen_one(scheme: str) -> None:
    model = frozen(train_the_pad_row, **SCHEMES[scheme])
    state, plain = fairseq_qn.decoded_state_dict(model), Net(seed=7).eval()
    assert list(state) == list(plain.state_dict()) and not any(
        tensor.requires_grad for tensor in state.values()
    )
    assert not torch.equal(state["block.fc1.weight"], model.state_dict()["block.fc1.weight"])
    plain.load_state_dict(state, strict=True)
    assert torch.equal(answers(plain), answers(model))
    assert state["head.weight"] is state["embed.weight"]


def test_what_is_not_frozen_is_the_parameter_whatever_noise_it_reads() -> None:
    model = Net()
    fairseq_qn.apply(model, recipe(kind="proxy", p=0.9))
    fairseq_qn.freeze(model, "emb")
    fairseq_qn.set_update(model.train(), 3)
    state = fairseq_qn.decoded_state_dict(model)
    assert state["block.fc1.weight"].data_ptr() == model.block.fc1.get_parameter("weight").data_ptr()
    assert torch.equal(state["embed.weight"], model.embed.weight)


def test_parts_copies_and_odd_owners() -> None:
    """Of a part of a model under the part's names; of a module that goes by two names under both."""
    model = frozen()
    part = fairseq_qn.decoded_state_dict(copy.deepcopy(model).block)
    assert list(part) == list(Net().block.state_dict())
    assert torch.equal(part["attn.q_proj.weight"], model.block.attn.q_proj.weight)
    shared = Shared()
    fairseq_qn.apply(
        shared, {"version": 1, "rules": [{"layers": "[bc]", "scheme": "product", "n_centroids": 5}]}
    )
    fairseq_qn.freeze(shared)
    plain = Shared().eval()
    plain.load_state_dict(fairseq_qn.decoded_state_dict(shared), strict=True)
    assert torch.equal(answers(plain), answers(shared.eval()))


@pytest.mark.parametrize("mode", MODES)
def test_of_loaded_models(mode: str, tmp_path) -> None:
    model = frozen()
    fairseq_qn.save(model, tmp_path / "m", parts="float32")
    loaded = fairseq_qn.load(tmp_path / "m", mode, Net())
    if mode == "dense":
        assert all(
            torch.equal(a, b)
            for a, b in zip(*(fairseq_qn.decoded_state_dict(m).values() for m in (loaded, model)))
        )
    else:
        with pytest.raises(
            UnsupportedError,
            match='^decoded_state_dict: the model is packed; load its file with mode="dense"',
        ):
            fairseq_qn.decoded_state_dict(nn.Sequential(loaded))
