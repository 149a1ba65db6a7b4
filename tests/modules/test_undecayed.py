"""What a scheme learns beside a weight: a Parameter of the layer like any other, but for weight decay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from fairseq.optim.adam import Adam as FairseqAdam
from fairseq.optim.nag import NAG
from small import LAYERS, Net, loss
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from toy import Toy

import fairseq_qn
from fairseq_qn.errors import MismatchError, UnsupportedError
from fairseq_qn.modules.adopt import adopt
from fairseq_qn.modules.undecayed import spare
from fairseq_qn.modules.view import views_of
from fairseq_qn.schemes import SCHEMES

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": partial(SGD, lr=0.1, momentum=0.9, nesterov=True), "adam": partial(Adam, lr=0.1),
    "adamw": partial(AdamW, lr=0.1), "fairseq adam": partial(FairseqAdam, lr=0.1),
    "nag": partial(NAG, lr=0.1, momentum=0.9),
}  # fmt: skip


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    SCHEMES["toy"] = Toy
    yield
    del SCHEMES["toy"]


def viewed() -> Net:
    model = Net()
    rules = [{"layers": name.replace(".", r"\."), "scheme": "toy"} for name in LAYERS]
    recipe = {"version": 1, "noise": {"kind": "exact", "p": 0.5}, "rules": rules}
    dense = {key for key, _ in Net().named_parameters() if key.removesuffix(".weight") not in LAYERS}
    for _ in range(2):  # the second time the gains are there
        assert fairseq_qn.apply(model, recipe, seed=0).left.keys() == dense
    fairseq_qn.refresh(model)
    return model.train()


def trained(model: nn.Module, params: list[Tensor], optimizer: Optimizer) -> list[Tensor]:
    """Five steps by made-up gradients."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [view.parameter("gain").detach().clone() for view in views_of(model)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_passes_them_over(name: str) -> None:
    found = {}
    for decay in (0.0, 0.5):
        model = viewed()
        with torch.no_grad():
            for view in views_of(model):
                view.parameter("gain").fill_(3.0)
        params = list(model.parameters())
        optimizer = OPTIMIZERS[name](params, weight_decay=decay)
        fairseq_qn.follow(model, optimizer)
        fairseq_qn.follow(model, optimizer)
        found[decay] = trained(model, params, optimizer), model.block.fc1.bias.detach().clone()
        assert len(optimizer.param_groups) == 1
    torch.testing.assert_close(found[0.5][0], found[0.0][0])
    assert (found[0.5][1] - found[0.0][1]).abs().min() > 1e-4, "everything else decays"
    assert min((gain - 3).abs() for gain in found[0.0][0]) > 1e-3, "they are trained"


def test_within_a_flat_master() -> None:
    """As plain --fp16 has it: one fp32 tensor for all."""
    found = {}
    for decay in (0.0, 0.5):
        model = viewed()
        params = list(model.parameters())
        flat = nn.Parameter(torch.cat([p.detach().view(-1) for p in params]) + 1)
        ends = torch.tensor([p.numel() for p in params]).cumsum(0).tolist()
        masters = {p: (flat, end - p.numel()) for p, end in zip(params, ends)}
        optimizer = AdamW([flat], lr=0.1, weight_decay=decay)
        spare(model, [optimizer], masters)
        trained(model, [flat], optimizer)
        gains = torch.zeros(len(flat), dtype=torch.bool)
        for view in views_of(model):
            gains[masters[view.parameter("gain")][1]] = True
        found[decay] = flat.detach().clone()
    same = (found[0.0] - found[0.5]).abs() < 1e-6
    assert same[gains].all() and not same[~gains].all()


def test_a_step_that_raises_loses_nothing() -> None:
    model = viewed()
    gain = next(views_of(model)).parameter("gain")
    optimizer = SGD(model.parameters(), lr=0.1)
    spare(model, [optimizer])
    with torch.no_grad():
        gain.fill_(2.0)

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(fails)  # after ours
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    handle.remove()
    gain.grad = torch.zeros(1)
    optimizer.step()
    assert gain.tolist() == [2.0]


def test_states_of_before_get_them_and_frozen_ones_need_them() -> None:
    model = viewed()
    loss(model).backward()
    assert all(view.parameter("gain").grad is not None for view in views_of(model))
    state = model.state_dict()
    without = {key: value for key, value in state.items() if not key.endswith("gain")}
    adopted = dict(without)
    adopt(adopted, views_of(model))
    assert adopted.keys() == state.keys()
    plain = dict(state)
    adopt(plain, [])
    assert plain.keys() == Net().state_dict().keys()
    fairseq_qn.freeze(model)
    frozen = {key: value for key, value in model.state_dict().items() if not key.endswith("fc1.gain")}
    with pytest.raises(
        MismatchError, match=r"^block.fc1.weight: frozen in the checkpoint, but its gain are"
    ):
        adopt(frozen, views_of(model))
    wide = {**model.state_dict(), "block.fc1.gain": torch.zeros(2)}
    with pytest.raises(MismatchError, match=r"but expected gain \[1\], found \[2\]"):
        adopt(wide, views_of(model))


def test_they_leave_with_the_view() -> None:
    model = viewed()
    copied = copy.deepcopy(model)
    assert next(views_of(copied)).parameter("gain") is copied.embed._parameters["gain"]
    fairseq_qn.freeze(model)
    keys = fairseq_qn.decoded_state_dict(model).keys()
    fairseq_qn.remove(model)
    assert keys == model.state_dict().keys() == Net().state_dict().keys()
    taken = Net()
    taken.block.fc1.gain = 3
    with pytest.raises(UnsupportedError, match="already has a 'gain', a name that the view needs"):
        fairseq_qn.apply(taken, {"version": 1, "rules": [{"layers": ".*fc1", "scheme": "toy"}]})
    assert "phase" not in dict(taken.block.fc1.named_buffers())
