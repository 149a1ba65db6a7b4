"""Learned bits by fairseq's own loop: the size penalty, logits at their own rate, resumed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_run import EACH, MLM, STAGES, build, differing, train, write_recipe

import fairseq_qn
from fairseq_qn import hub
from fairseq_qn.errors import UnsupportedError
from fairseq_qn.modules.view import FROZEN, views_of

LAYERS = {"ffn": r".*\.fc[12]", "emb": ".*embed_tokens", "attn": r".*attn\.(q|k|v|out)_proj"}
MASTERS = {"--fp16": None, "--fp16-no-flatten-grads": None, "--fp16-init-scale": 4}


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    rules = [{"layers": LAYERS[stage], "stage": stage, "scheme": "learned_bits"} for stage in STAGES]
    recipe = {"version": 1, "noise": {"kind": "proxy", "p": 1.0}, "rules": rules, "stages": [*STAGES]}
    return {"--quant-recipe": write_recipe(tmp_path / "recipe.yaml", recipe)}


def logits(state: dict[str, Any]) -> torch.Tensor:
    return torch.cat([value.float() for key, value in state["model"].items() if key.endswith("bit_logits")])


@pytest.mark.parametrize("more", [{}, MASTERS], ids=["fp32", "fp16 over masters"])
def test_they_train_freeze_resume_ship_and_answer(
    more: dict[str, Any], options: dict[str, Any], data, tmp_path: Path
) -> None:
    penalty = {"--size-weight": 100, "--quant-logits-lr": 0.02, "--weight-decay": 0.1, "--max-update": 8}
    words = [str(data.lm), MLM, options, {"--quant-stage-updates": "2,4,6"}, penalty, more]
    run = train(tmp_path / "run", words, EACH)
    assert all(view.phase == FROZEN for view in views_of(run.model))
    moved = logits(run.at(2)) - logits(run.at(1))
    # a step of Adam's is at most about its rate; fc1 and fc2 were frozen after update 2
    assert 0.01 < float(moved.abs().median()) < 0.03 and float(moved.median()) < 0
    logged = [figures["qn_real_size_mib"] for figures in run.logged()]
    assert len(logged) == 8 and 0 < min(logged) < logged[0]
    rounded = [figures["qn_size_mib"] for figures in run.logged()]
    assert rounded[0] == pytest.approx(logged[0], rel=1e-3) and len({*rounded}) < len({*logged})
    if not more:  # of fp16 fairseq keeps no masters, so that nothing resumes to the bit
        resumed = train(tmp_path / "resumed", words, {"--restore-file": run.path(5)})
        assert differing(run.state()["model"], resumed.state()["model"]) == []
        assert differing(run.state()["last_optimizer_state"], resumed.state()["last_optimizer_state"]) == []
    model, _, _ = hub.load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")
    predicted = fairseq_qn.predict_size(model, parts="float32")
    assert predicted == fairseq_qn.save(model, tmp_path / "m.qn.safetensors", parts="float32").total
    tokens = torch.tensor([[0, 5, 6, 7, 2]])
    for mode in ("dense", "packed"):
        found = hub.load_interface(tmp_path / "m.qn.safetensors", mode).model(tokens)[0]
        torch.testing.assert_close(found, model(tokens)[0], rtol=1e-4, atol=1e-5)


def test_the_penalty_by_hand(options: dict[str, Any], data) -> None:
    """sample size * weight * MiB, in training alone, of all groups of 16 at their first 8 bits."""
    found = {}
    for weight in (0, 40):
        built = build(
            data.lm, MLM, options, {"--size-weight": weight, "--dropout": 0, "--attention-dropout": 0}
        )
        fairseq_qn.set_update(built.model, 1)
        for training in (True, False):
            loss, size, log = built.criterion(built.model.train(training), built.sample)
            found[weight, training] = float(loss)
            assert ("qn_size_mib" in log) is (training and weight > 0) and float(log["loss"]) == float(loss)
    shapes = [view.shape.numel() for view in views_of(built.model)]
    mib = sum(8 * n + 64 for n in shapes) / 8 / 2**20  # one width for all takes no bits
    assert found[40, True] - found[0, True] == pytest.approx(int(size) * 40 * mib, rel=1e-3)
    assert found[40, False] == found[0, False]


def test_a_penalty_on_nothing_is_an_error(data) -> None:
    built = build(data.lm, MLM, {"--size-weight": 1})
    with pytest.raises(UnsupportedError, match="no layer learns its size; use scheme: learned_bits"):
        built.criterion(built.model.train(), built.sample)
    with pytest.raises(UnsupportedError, match="expected size_weight of 0 or more, found -1"):
        build(data.lm, MLM, {"--size-weight": -1})
