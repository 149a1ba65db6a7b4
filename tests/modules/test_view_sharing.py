"""A Parameter with several owners is read once in a forward pass: one value, one gradient, and nothing kept
afterwards.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from small import IDS, NOISES, Net, clock_of, loss, noisy, recipe
from torch import Tensor, nn
from torch.nn import functional as F

import fairseq_qn
from fairseq_qn.quant.reading import Read

PHASES = [*NOISES, "frozen"]


def in_phase(phase: str) -> Net:
    if phase in NOISES:
        return noisy(noise=phase)
    model = Net().train()
    fairseq_qn.apply(model, recipe())
    fairseq_qn.freeze(model)
    return model


def seen(model: Net, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What embedding and head compute with during a forward pass."""
    tables: list[Tensor] = []

    def spy(function: object) -> object:
        def call(x: Tensor, weight: Tensor, *args: object) -> Tensor:
            if weight.shape == model.embed.get_parameter("weight").shape:
                tables.append(weight)
            return function(x, weight, *args)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(F, "embedding", spy(F.embedding))
        patch.setattr(F, "linear", spy(F.linear))
        model(IDS)
    return tables


@pytest.mark.parametrize("phase", PHASES)
def test_owners_see_one_tensor_in_a_pass_and_another_in_the_next(
    phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = in_phase(phase)
    fairseq_qn.set_update(model, 3)
    (a, b), (c, d) = seen(model, monkeypatch), seen(model, monkeypatch)
    assert a is b and c is d and a is not c and torch.equal(a, c)
    # outside a pass nobody knows how long a value is good for
    assert model.embed.weight is not model.embed.weight
    with torch.no_grad():
        (a, b) = seen(model, monkeypatch)
    assert a is not b and torch.equal(a, b)  # and nothing is kept where autograd would not keep it either


@pytest.mark.parametrize("phase", PHASES)
def test_the_gradient_is_that_of_reads_of_their_own(phase: str) -> None:
    gradients = []
    for shared in (True, False):
        model = in_phase(phase)
        fairseq_qn.set_update(model, 3)
        if not shared:
            model._forward_pre_hooks.clear()  # no pass ever begins
        loss(model).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


def test_a_frozen_gradient_is_projected_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    backward = Read.backward
    monkeypatch.setattr(
        Read, "backward", staticmethod(lambda ctx, g: calls.append(g.shape) or backward(ctx, g))
    )
    model = in_phase("frozen")
    loss(model).backward()
    assert calls.count(model.embed.get_parameter("weight").shape) == 1


def test_two_passes_before_one_backward() -> None:
    """As consistency losses have it; each pass has its noise, gradients add up."""
    model, apart = noisy(), noisy()
    (loss(model) + loss(model)).backward()
    for _ in range(2):
        loss(apart).backward()
    for a, b in zip(model.parameters(), apart.parameters()):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("phase", PHASES)
def test_weights_written_behind_autograd_are_read_in_the_next_pass(phase: str) -> None:
    """fairseq's optimisers write to `.data`, which no version counts."""
    model, twin = in_phase(phase), in_phase(phase)
    fairseq_qn.set_update(model, 3)
    model(IDS)
    for m in (model, twin):
        m.embed.get_parameter("weight").data.mul_(2)
        fairseq_qn.set_update(m, 3)
    assert torch.equal(model(IDS), twin(IDS))


def test_nothing_is_kept_after_a_pass_that_fails_or_is_let_go() -> None:
    model = noisy()
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    assert clock_of(model).values is None
    kept = []
    model.block.register_forward_hook(lambda *_: kept.append(weakref.ref(model.embed.weight)))
    out = model(IDS)
    assert clock_of(model).values is None and kept
    del out
    gc.collect()
    assert kept[0]() is None


def test_a_module_that_is_read_under_two_names_or_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a

        def forward(self) -> tuple[Tensor, Tensor]:
            return self.a.weight, self.b.weight

    model = Twice().train()
    fairseq_qn.apply(model, recipe() | {"rules": [{"layers": "a", "scheme": "product", "block_size": 4}]})
    fairseq_qn.freeze(model)
    first, second = model()
    assert first is second
