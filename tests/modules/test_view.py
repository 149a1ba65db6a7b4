"""The weight view while a model trains: what each reader sees, when it changes, and what the gradient is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import IDS, LAYERS, PAD, Net, loss, recipe
from torch import Tensor, nn
from torch.nn import functional as F

import fairseq_qn
from fairseq_qn.errors import UnsupportedError, ViewError
from fairseq_qn.modules.clock import Clock
from fairseq_qn.modules.view import views_of
from fairseq_qn.quant.integer import fake_quantize

NOISES = {
    "proxy": {"kind": "proxy"},
    "exact": {"kind": "exact"},
    "int4": {"kind": "proxy", "scheme": "integer", "bits": 4},
}


def noisy(*names: str, p: float = 0.5, noise: str = "proxy", seed: int = 0, **net: Any) -> Net:
    """A model in training with noise on the named layers, or all."""
    model = Net(**net)
    fairseq_qn.apply(model, recipe(*names, p=p, **NOISES[noise]), seed=seed)
    fairseq_qn.refresh(model)
    return model.train()


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
    assert not model.embed._parameters["weight"].grad[PAD].sub(dense.embed.weight.grad[PAD]).any()


def test_proxy_drops_whole_blocks_at_the_right_rate() -> None:
    model = nn.Sequential(nn.Linear(64, 200)).train()
    rule = {"layers": "0", "scheme": "product", "block_size": 8}
    fairseq_qn.apply(model, {"version": 1, "noise": {"kind": "proxy", "p": 0.3}, "rules": [rule]})
    model(torch.zeros(1, 64))
    dropped = model[0].weight.reshape(-1, 8).eq(0)
    assert torch.equal(dropped.all(1), dropped.any(1))
    assert abs(int(dropped.all(1).sum()) - 480) < 5 * (1600 * 0.21) ** 0.5
    kept = ~dropped.all(1)
    assert torch.equal(model[0].weight.reshape(-1, 8)[kept], model[0]._parameters["weight"].reshape(-1, 8)[kept])


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_exact_noise_puts_cluster_means_on_blocks(p: float) -> None:
    model = noisy(noise="exact", p=p)
    model(IDS)
    for view in views_of(model):
        d = view.rule.block_size
        stored, seen = view.weight.detach().reshape(-1, d), view.home.weight.detach().reshape(-1, d)
        means = view.quantized(view.weight.detach()).reshape(-1, d)
        either = (seen == stored).all(1) | (seen == means).all(1)
        assert either.all() and (p < 1 or torch.equal(seen, means)), view.name
        assert not torch.equal(seen, stored) or view.weight.numel() < 20  # the mask may spare a small layer's clusters


def test_integer_noise_is_on_single_weights() -> None:
    model = noisy("block.fc1", noise="int4", p=0.5)
    model(IDS)
    stored, seen = model.block.fc1._parameters["weight"], model.block.fc1.weight
    integers = fake_quantize(stored.detach(), 4)
    changed = seen != stored
    assert torch.equal(seen[changed], integers[changed]) and 0.2 < float(changed.float().mean()) < 0.8
    assert (changed.any(1) & ~changed.all(1)).any()
    model = noisy("block.fc1", noise="int4", p=1.0)
    model(IDS)
    assert torch.equal(model.block.fc1.weight, integers)


# -- which mask


def test_tied_owners_see_one_mask_and_another_in_the_next_pass() -> None:
    model = noisy()
    seen = []
    for _ in range(3):
        model(IDS)
        assert torch.equal(model.embed.weight, model.head.weight)
        assert torch.equal(model.embed.weight, model.embed.weight)
        seen.append(model.head.weight.detach())
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_the_head_follows_the_matched_owner_where_their_training_flags_differ() -> None:
    model = noisy()
    model(IDS)
    model.head.eval()
    assert torch.equal(model.embed.weight, model.head.weight)
    model.embed.eval()
    assert torch.equal(model.head.weight, model.embed._parameters["weight"])


def test_layers_draw_masks_of_their_own() -> None:
    model = noisy()
    model(IDS)
    masks = [getattr(model.block.attn, f"{n}_proj").weight.eq(0) for n in "qkv"]
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_set_update_says_which_mask() -> None:
    model = noisy()

    def draw(n: int, micro: int = 0, of: Net = model) -> Tensor:
        fairseq_qn.set_update(of, n, micro)
        of(IDS)
        return of.block.fc1.weight.detach()

    first = draw(7)
    assert torch.equal(model.block.fc1.weight, first)
    model(IDS)
    assert torch.equal(model.block.fc1.weight, first)  # pinned: no forward moves it
    assert not torch.equal(draw(8), first) and not torch.equal(draw(7, 1), first)
    assert torch.equal(draw(7), first)
    assert torch.equal(draw(7, of=noisy()), first)  # a resumed run
    assert not torch.equal(draw(7, of=noisy(seed=1)), first)


def test_ranks_draw_different_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = noisy()
    fairseq_qn.set_update(model, 1)
    first = model.block.fc1.weight.detach()
    monkeypatch.setattr(Clock, "rank", 1)
    assert not torch.equal(model.block.fc1.weight, first)


def test_noise_takes_no_random_numbers_from_others() -> None:
    model = noisy()
    state = torch.random.get_rng_state()
    model(IDS)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_p_follows_its_schedule() -> None:
    model = nn.Sequential(nn.Linear(64, 400)).train()
    noise = {"kind": "proxy", "p": [[0, 0.0], [100, 0.5]]}
    rule = {"layers": "0", "scheme": "product", "block_size": 8}
    fairseq_qn.apply(model, {"version": 1, "noise": noise, "rules": [rule]})
    for update, p in ((0, 0), (50, 0.25), (100, 0.5), (500, 0.5)):
        fairseq_qn.set_update(model, update)
        rate = float(model[0].weight.reshape(-1, 8).eq(0).all(1).float().mean())
        assert abs(rate - p) <= 5 * (p * (1 - p) / 3200) ** 0.5


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputing_a_block_sees_the_mask_of_its_forward(reentrant: bool, noise: str) -> None:
    gradients = []
    for recompute in (None, reentrant):
        model = noisy(noise=noise, recompute=recompute)
        fairseq_qn.set_update(model, 3)
        for micro in range(3):  # gradients accumulate over micro-batches, as with --update-freq
            fairseq_qn.set_update(model, 3, micro)
            loss(model).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_recomputing_without_set_update() -> None:
    gradients = []
    for recompute in (None, False):
        model = noisy(recompute=recompute)
        for _ in range(3):
            loss(model).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


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
    assert model.embed.weight is model.embed._parameters["weight"]
    model = noisy(p=0.0)
    model(IDS)
    assert model.embed.weight is model.embed._parameters["weight"]


# -- exact noise and its codebooks


def test_exact_noise_needs_codes_first() -> None:
    model = Net().train()
    fairseq_qn.apply(model, recipe(kind="exact", p=0.5))
    with pytest.raises(
        ViewError, match=r"^embed.weight: exact noise before its codebook was learned; call fairseq_qn.refresh"
    ):
        model(IDS)
    model.eval()(IDS)
    fairseq_qn.set_update(model.train(), 0)  # learns what is missing
    model(IDS)


def test_codes_are_refreshed_every_n_updates() -> None:
    model = Net().train()
    fairseq_qn.apply(model, recipe(kind="exact", p=0.5, refresh=3))
    learned = []
    for update in range(7):
        for micro in range(2):
            fairseq_qn.set_update(model, update, micro)
            learned.append(model.embed.codes.clone())
        with torch.no_grad():
            model.embed._parameters["weight"].normal_(generator=torch.Generator().manual_seed(update))
    changed = [i for i in range(1, len(learned)) if not torch.equal(learned[i], learned[i - 1])]
    assert changed == [6, 12]  # the first micro-batch of updates 3 and 6


def test_refresh_keeps_to_the_views_that_need_it() -> None:
    model = Net()
    fairseq_qn.apply(model, recipe(kind="proxy", p=0.5))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert fairseq_qn.refresh(model) == []
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    exact = Net()
    fairseq_qn.apply(exact, recipe(kind="exact", p=0.5))
    fairseq_qn.freeze(exact, "emb")
    assert {report.stage for report in fairseq_qn.refresh(exact)} == {"ffn", "conv"}


# -- what a view refuses


def test_an_attribute_error_inside_a_view_does_not_hand_out_the_raw_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    model = noisy()
    view = next(iter(views_of(model)))
    monkeypatch.setattr(view, "clock", None)
    with pytest.raises(ViewError, match=r"^Embedding.weight: the view cannot be read: .*NoneType"):
        model.embed.weight  # noqa: B018
    with pytest.raises(ViewError):
        F.linear(torch.zeros(1, 8), model.head.weight)


def test_a_plain_tensor_is_refused_and_a_parameter_taken() -> None:
    model = noisy()
    before = model.block.fc1._parameters["weight"]
    with pytest.raises(
        UnsupportedError, match=r"^Linear.weight: a viewed weight takes a Parameter, found Tensor; .*FSDP"
    ):
        model.block.fc1.weight = torch.zeros(16, 8)
    assert model.block.fc1._parameters["weight"] is before
    model.block.fc1.weight = nn.Parameter(torch.ones(16, 8))
    assert model.block.fc1._parameters["weight"].sum() == 128
    fairseq_qn.set_update(model, 1)
    assert 0 < model.block.fc1.weight.sum() < 128


def test_assigning_what_was_read_restores_a_tie() -> None:
    model = noisy()
    model(IDS)
    model.head._parameters["weight"] = nn.Parameter(torch.zeros(20, 8))
    model.head.weight = model.embed.weight  # noised: a plain tensor
    assert model.head._parameters["weight"] is model.embed._parameters["weight"]
