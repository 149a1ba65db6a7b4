"""The weight view while a model trains: what each reader sees, what the gradient is, and what a view
refuses.
"""

from __future__ import annotations

import pytest
import torch
from small import IDS, LAYERS, NOISES, PAD, Net, loss, noisy
from torch import Tensor, nn
from torch.nn import functional as F

import fairseq_qn
from fairseq_qn.errors import UnsupportedError, ViewError
from fairseq_qn.modules.view import views_of
from fairseq_qn.quant.integer import fake_quantize


def layer(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name)


def read(model: nn.Module) -> dict[str, Tensor]:
    """What each layer's `.weight` gives now."""
    return {name: layer(model, name).weight.detach().clone() for name in LAYERS}


def with_weights(weights: dict[str, Tensor]) -> Net:
    """An ordinary dense model with these weights."""
    model = Net().train()
    with torch.no_grad():
        for name, weight in weights.items():
            layer(model, name).weight.copy_(weight)
    return model


@pytest.mark.parametrize("noise", NOISES)
def test_a_hundred_training_forwards_write_nothing(noise: str) -> None:
    model = noisy(noise=noise)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    outputs = [model(IDS) for _ in range(100)]
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items())
    assert len({float(out.detach().sum()) for out in outputs}) == 100


@pytest.mark.parametrize("name", LAYERS)
def test_noise_reaches_every_kind_of_read(name: str) -> None:
    """p = 1 of the proxy on one layer is that layer at zero, for whoever reads it."""
    model = noisy(name, p=1)
    plain = Net().train()
    normal = plain(IDS)
    with torch.no_grad():
        layer(plain, name).weight.zero_()
    found = model(IDS)
    assert torch.equal(found, plain(IDS)) and not torch.allclose(found, normal)


@pytest.mark.parametrize("noise", NOISES)
def test_the_network_computes_with_the_noised_weights(noise: str) -> None:
    model = noisy(noise=noise)
    for _ in range(3):
        scores = model(IDS)
        torch.testing.assert_close(scores, with_weights(read(model))(IDS))


@pytest.mark.parametrize("noise", NOISES)
def test_straight_through(noise: str) -> None:
    """The gradient is that of a dense model at the noised weights, as if phi were the identity."""
    model = noisy(noise=noise)
    loss(model).backward()
    dense = with_weights(read(model))
    loss(dense).backward()
    for (name, parameter), other in zip(model.named_parameters(), dense.parameters()):
        assert parameter.grad.abs().sum() > 0, name
        torch.testing.assert_close(parameter.grad, other.grad, msg=name)
    assert not model.embed.get_parameter("weight").grad[PAD].sub(dense.embed.weight.grad[PAD]).any()


def test_proxy_drops_whole_blocks_at_the_right_rate() -> None:
    model = nn.Sequential(nn.Linear(64, 200)).train()
    rule = {"layers": "0", "scheme": "product", "block_size": 8}
    fairseq_qn.apply(model, {"version": 1, "noise": {"kind": "proxy", "p": 0.3}, "rules": [rule]})
    model(torch.zeros(1, 64))
    dropped = model[0].weight.reshape(-1, 8).eq(0)
    assert torch.equal(dropped.all(1), dropped.any(1))
    assert abs(int(dropped.all(1).sum()) - 480) < 5 * (1600 * 0.21) ** 0.5
    kept = ~dropped.all(1)
    assert torch.equal(
        model[0].weight.reshape(-1, 8)[kept], model[0].get_parameter("weight").reshape(-1, 8)[kept]
    )


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_exact_noise_puts_cluster_means_on_blocks(p: float) -> None:
    model = noisy(noise="exact", p=p)
    model(IDS)
    for view in views_of(model):
        d = view.scheme.block_size
        stored, seen = view.weight.detach().reshape(-1, d), view.home.weight.detach().reshape(-1, d)
        means = view.quantized().reshape(-1, d)
        either = (seen == stored).all(1) | (seen == means).all(1)
        assert either.all() and (p < 1 or torch.equal(seen, means)), view.name
        # the mask may spare a small layer's clusters
        assert not torch.equal(seen, stored) or view.weight.numel() < 20


def test_integer_noise_is_on_single_weights() -> None:
    model = noisy("block.fc1", noise="int4", p=0.5)
    model(IDS)
    stored, seen = model.block.fc1.get_parameter("weight"), model.block.fc1.weight
    integers = fake_quantize(stored.detach(), 4)
    changed = seen != stored
    assert torch.equal(seen[changed], integers[changed]) and 0.2 < float(changed.float().mean()) < 0.8
    assert (changed.any(1) & ~changed.all(1)).any()
    model = noisy("block.fc1", noise="int4", p=1.0)
    model(IDS)
    assert torch.equal(model.block.fc1.weight, integers)


# -- when there is none


@pytest.mark.parametrize("noise", NOISES)
def test_evaluation_is_noise_free_and_repeats(noise: str) -> None:
    model = noisy(noise=noise, p=1.0)
    for _ in range(2):
        model.train()(IDS)
        with torch.no_grad():
            out = model.eval()(IDS)
        assert torch.equal(out, Net().eval()(IDS)) and torch.equal(out, model(IDS))
        fairseq_qn.set_update(model, 5)


def test_nobody_sees_noise_before_training_began_or_at_p_0() -> None:
    model = noisy(p=1.0)
    assert model.embed.weight is model.embed.get_parameter("weight")
    model = noisy(p=0.0)
    model(IDS)
    assert model.embed.weight is model.embed.get_parameter("weight")


# -- what a view refuses


def test_an_attribute_error_inside_a_view_does_not_hand_out_the_raw_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = noisy()
    view = next(iter(views_of(model)))
    monkeypatch.setattr(view, "clock", None)
    with pytest.raises(ViewError, match=r"^Embedding.weight: the view cannot be read: .*NoneType"):
        model.embed.weight  # noqa: B018
    with pytest.raises(ViewError):
        F.linear(torch.zeros(1, 8), model.head.weight)


def test_a_plain_tensor_is_refused_and_a_parameter_taken() -> None:
    model = noisy()
    before = model.block.fc1.get_parameter("weight")
    with pytest.raises(
        UnsupportedError, match=r"^Linear.weight: a viewed weight takes a Parameter, found Tensor; .*FSDP"
    ):
        model.block.fc1.weight = torch.zeros(16, 8)
    assert model.block.fc1.get_parameter("weight") is before
    model.block.fc1.weight = nn.Parameter(torch.ones(16, 8))
    assert model.block.fc1.get_parameter("weight").sum() == 128
    fairseq_qn.set_update(model, 1)
    assert 0 < model.block.fc1.weight.sum() < 128


def test_assigning_what_was_read_restores_a_tie() -> None:
    model = noisy()
    model(IDS)
    model.head._parameters["weight"] = nn.Parameter(torch.zeros(20, 8))
    model.head.weight = model.embed.weight  # noised: a plain tensor
    assert model.head.get_parameter("weight") is model.embed.get_parameter("weight")
