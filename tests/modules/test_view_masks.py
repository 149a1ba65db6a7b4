"""Which mask a view draws and when: by update, micro-batch, rank and layer, and the same when a block is
computed again.
"""

from __future__ import annotations

import pytest
import torch
from small import IDS, NOISES, Net, loss, noisy, recipe
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn.errors import ViewError
from fairseq_qn.modules.clock import Clock


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
    assert torch.equal(model.head.weight, model.embed.get_parameter("weight"))


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


def test_evaluation_in_between_moves_no_mask() -> None:
    seen = []
    for evaluate in (False, True):
        model = noisy()
        model(IDS)
        if evaluate:
            model.eval()(IDS)
        model.train()(IDS)
        seen.append(model.block.fc1.weight.detach())
    assert torch.equal(*seen)


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


# -- exact noise and its codebooks


def test_exact_noise_needs_codes_first() -> None:
    model = Net().train()
    fairseq_qn.apply(model, recipe(kind="exact", p=0.5))
    with pytest.raises(
        ViewError,
        match=r"^embed.weight: noise before its codes or ranges were learned; call fairseq_qn.refresh",
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
                model.embed.get_parameter("weight").normal_(
                    generator=torch.Generator().manual_seed(2 * update + micro)
                )
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
