"""Quantisation noise in fairseq's own models and loop: where it reaches, that it leaves no trace, what
recompute sees.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_run import LANGUAGE, MLM, PAIRS, build, differing, recipe, train, write_recipe
from torch import Tensor

import fairseq_qn
from fairseq_qn.api import recipe_of
from fairseq_qn.modules.view import FROZEN, views_of

QUIET = {"--dropout": 0, "--attention-dropout": 0}
STOCK = {**MLM, "--task": "masked_lm", "--arch": "roberta", "--criterion": "masked_lm"}
del STOCK["--wrapped-criterion"]
STANDING_STILL = {"--lr": 0, "--end-learning-rate": 0}


FLAGS = {"--quant-noise-pq": 0.1, "--quant-noise-pq-block-size": 8}


def noisy(tmp_path: Path, **noise: Any) -> dict[str, Any]:
    return {
        "--quant-recipe": write_recipe(
            tmp_path / "recipe.yaml", recipe({"kind": "proxy", "p": 0.2, **noise})
        )
    }


def stored(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_a_hundred_forwards_leave_no_trace(data, tmp_path: Path) -> None:
    """fp32, 30 updates of up to 4 micro-batches at a learning rate of 0; upstream's hook would have zeroed
    the weights.
    """
    before: dict[str, Tensor] = {}
    masks: list[str] = []

    def watch(trainer: Any) -> None:
        before.update(stored(trainer.model))
        fc1 = trainer.model.encoder.sentence_encoder.layers[0].fc1
        fc1.register_forward_pre_hook(
            lambda module, _: masks.append(drawn(module.weight)) if module.training else None
        )

    run = train(
        tmp_path,
        data.lm,
        MLM,
        STANDING_STILL,
        {"--update-freq": 4, "--max-update": 30},
        noisy(tmp_path),
        watch=watch,
    )
    assert differing(before, stored(run.model)) == []
    assert len(masks) >= 100
    assert len(set(masks)) == len(masks), "a mask for each micro-batch"


def drawn(weight: Tensor) -> str:
    """Which blocks of 8 read as zero, as text."""
    return "".join("01"[int(z)] for z in weight.reshape(-1, 8).eq(0).all(1))


def test_noise_reaches_every_reader(data, tmp_path: Path) -> None:
    """The stock model with the noised weights in place of its own gives the same loss and the same
    gradients.
    """
    ours = build(data.lm, MLM, QUIET, noisy(tmp_path))
    stock = build(data.lm, STOCK, QUIET)
    fairseq_qn.set_update(ours.model.train(), 7, 2)
    twin = stock.model.train()
    twin.load_state_dict({k: v for k, v in ours.model.state_dict().items() if k in twin.state_dict()})
    read = {view.name: view.home.weight.detach().clone() for view in views_of(ours.model)}
    parts = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "embed_tokens")
    assert {part: sum(part in name for name in read) for part in parts} == {
        **dict.fromkeys(parts, 2),
        "embed_tokens": 1,
    }
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name in read:
                size = 4 if "_proj" in name else 8
                zeroed = read[name].reshape(-1, size).eq(0).all(1)
                assert 0.05 < float(zeroed.float().mean()) < 0.4, name
                kept = parameter.reshape(-1, size)[~zeroed]
                assert kept.equal(read[name].reshape(-1, size)[~zeroed]), "the other blocks stay as they are"
                parameter.copy_(read[name])
    losses = [built.criterion(built.model, ours.sample)[0] for built in (ours, stock)]
    assert losses[0].equal(losses[1])
    for loss in losses:
        loss.backward()
    gradients = [{name: p.grad for name, p in built.model.named_parameters()} for built in (ours, stock)]
    assert differing(*gradients) == []
    assert ours.model.encoder.lm_head.weight.equal(read["encoder.sentence_encoder.embed_tokens.weight"]), (
        "one mask for both"
    )


def test_evaluation_is_free_of_noise(data, tmp_path: Path) -> None:
    ours = build(data.lm, MLM, noisy(tmp_path))
    clean = build(
        data.lm, MLM, {"--quant-recipe": write_recipe(tmp_path / "none.yaml", recipe({"kind": "none"}))}
    )
    fairseq_qn.set_update(ours.model, 7)
    with torch.no_grad():
        losses = [b.criterion(b.model.eval(), ours.sample)[0] for b in (ours, ours, clean)]
        trained = ours.criterion(ours.model.train(), ours.sample)[0]
    assert losses[0] == losses[1] == losses[2] != trained


@pytest.mark.parametrize("noise", ["proxy", "exact"])
def test_recompute_sees_the_same_noise(noise: str, data, tmp_path: Path) -> None:
    """--checkpoint-activations changes no gradient, but for the order of sums; another mask would change all
    of them.
    """
    words = [data.pairs, PAIRS, noisy(tmp_path, kind=noise)]
    plain, spare = build(words), build(words, "--checkpoint-activations")
    again, other = gradients(plain, micro=1), gradients(plain, micro=2)
    recomputed = gradients(spare, micro=1)
    scale = max(float(gradient.abs().max()) for gradient in again.values())
    for name, gradient in again.items():
        assert torch.allclose(gradient, recomputed[name], atol=1e-6 * scale, rtol=1e-4), name
        assert (
            not torch.allclose(gradient, other[name], atol=1e-6 * scale, rtol=1e-4) or "k_proj.bias" in name
        ), name


def gradients(built: Any, micro: int) -> dict[str, Tensor]:
    fairseq_qn.set_update(built.model.train(), 5, micro)
    built.model.zero_grad()
    torch.manual_seed(0)  # of dropout
    built.criterion(built.model, built.sample)[0].backward()
    return {name: parameter.grad.clone() for name, parameter in built.model.named_parameters()}


@pytest.mark.parametrize(
    "options", [["--encoder-layerdrop", "0.5"], ["--checkpoint-activations"]], ids=lambda o: o[0]
)
def test_stages_beside_other_options(options: list[str], data, tmp_path: Path) -> None:
    words = [
        data.pairs,
        PAIRS,
        noisy(tmp_path),
        options,
        {"--max-update": 6, "--quant-stage-updates": "3,4,5"},
    ]
    first, second = (train(tmp_path / name, words) for name in "ab")
    assert first.logged()[-1]["qn_frozen_share"] == 1
    assert differing(first.state()["model"], second.state()["model"]) == []


def test_layers_to_keep(data, tmp_path: Path) -> None:
    """A frozen checkpoint trained with LayerDrop loads with fewer layers, and the kept ones are as they
    were.
    """
    stages = {"--max-update": 4, "--quant-stage-updates": "1,2,3", "--encoder-layerdrop": 0.5}
    run = train(tmp_path, data.lm, MLM, noisy(tmp_path), stages)
    path = str(tmp_path / "checkpoint_last.pt")
    (pruned,), _, _ = checkpoint_utils.load_model_ensemble_and_task([path], {"encoder_layers_to_keep": "1"})
    full, (layer,) = run.model.encoder.sentence_encoder, pruned.eval().encoder.sentence_encoder.layers
    assert len(full.layers) == 2
    assert all(view.phase == FROZEN for view in views_of(layer))
    for part in ("fc1", "fc2", "self_attn.q_proj", "self_attn.out_proj"):
        ours, theirs = (parent.get_submodule(part).weight for parent in (layer, full.layers[1]))
        assert ours.equal(theirs), part


@pytest.mark.parametrize(
    ("kind", "options"), [("lm", MLM), ("lm", LANGUAGE), ("pairs", PAIRS)], ids=["roberta", "lm", "mt"]
)
def test_fairseqs_own_flags_are_a_short_recipe(kind: str, options: dict, data, tmp_path: Path) -> None:
    built = build(getattr(data, kind), options, FLAGS)
    found = recipe_of(built.model)
    assert [(rule.scheme.block_size, rule.stage) for rule in found.rules] == [
        (8, "ffn"),
        (8, "emb"),
        (8, "attn"),
    ]
    assert found.noise.kind == "proxy" and found.noise.at(0) == found.noise.at(10**6) == 0.1
    hooks = {hook for module in built.model.modules() for hook in module._forward_pre_hooks.values()}
    assert {hook.__module__ for hook in hooks} == {"fairseq_qn.modules.clock"}, (
        "no hook of upstream's on any layer"
    )
    matched = {view.name for view in views_of(built.model)}
    assert all(
        any(part in name for name in matched)
        for part in ("fc1", "fc2", "q_proj", "out_proj", "embed_tokens")
    )
    before = stored(built.model)
    for update in range(50):
        fairseq_qn.set_update(built.model, update)
        built.criterion(built.model.train(), built.sample)[0].backward()
    assert differing(before, stored(built.model)) == []


def test_the_short_recipe_through_a_run(data, tmp_path: Path) -> None:
    """An existing command line with the qn_ names alone; the checkpoint holds the recipe, and upstream's
    noise is off.
    """
    run = train(tmp_path, data.lm, MLM, FLAGS, {"--max-update": 4, "--quant-stage-updates": "1,2,3"})
    assert run.logged()[-1]["qn_frozen_share"] == 1
    model = run.state()["cfg"]["model"]
    assert model.quant_noise_pq == 0 and '"block_size"' not in model.quant_recipe.split("stages")[1]
    (again,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(tmp_path / "checkpoint_last.pt")])
    assert recipe_of(again) == recipe_of(run.model)
    assert again.encoder.sentence_encoder.layers[0].fc1.weight.equal(
        run.model.encoder.sentence_encoder.layers[0].fc1.weight
    )


def test_scalar_noise_is_an_int8_recipe(data) -> None:
    built = build(data.lm, MLM, {"--quant-noise-scalar": 0.5})
    assert {(rule.scheme.name, rule.scheme.bits) for rule in recipe_of(built.model).rules} == {
        ("integer", 8)
    }
    fairseq_qn.set_update(built.model.train(), 1)
    for view in views_of(built.model):
        share = float((view.home.weight != view.weight).float().mean())
        assert 0.3 < share < 0.6, "half of the weights read as integers, the others as they are"
