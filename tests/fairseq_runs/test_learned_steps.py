"""Learned steps by fairseq's own loop: trained beside the weights, resumed to the bit, shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_run import EACH, MLM, STAGES, differing, train, write_recipe

import fairseq_qn
from fairseq_qn import hub
from fairseq_qn.modules.view import FROZEN, views_of

LAYERS = {"ffn": r".*\.fc[12]", "emb": ".*embed_tokens", "attn": r".*attn\.(q|k|v|out)_proj"}
MASTERS = {"--fp16": None, "--fp16-no-flatten-grads": None, "--fp16-init-scale": 4}


@pytest.mark.parametrize("more", [{}, MASTERS], ids=["fp32", "fp16 over masters"])
def test_they_train_freeze_resume_ship_and_answer(more: dict[str, Any], data, tmp_path: Path) -> None:
    lines = {"scheme": "integer", "bits": 3, "ranges": "learned"}
    rules = [{"layers": LAYERS[stage], "stage": stage, **lines} for stage in STAGES]
    recipe = {"version": 1, "noise": {"kind": "proxy", "p": 0.5}, "rules": rules, "stages": [*STAGES]}
    options = {"--quant-recipe": write_recipe(tmp_path / "recipe.yaml", recipe), "--max-update": 8}
    words = [str(data.lm), MLM, options, {"--quant-stage-updates": "2,4,6", "--weight-decay": 0.1}, more]
    run = train(tmp_path / "run", words, EACH)
    assert all(view.phase == FROZEN for view in views_of(run.model))
    before, state = run.at(1)["model"], run.state()["model"]
    for view in views_of(run.model):
        keys = [view.name.removesuffix("weight") + name for name in ("step_change", "ranges")]
        assert state[keys[0]].any() and not torch.equal(state[keys[0]], before[keys[0]])
        assert torch.equal(state[keys[1]], before[keys[1]]), "the first steps stay"
    if not more:  # of fp16 fairseq keeps no masters, so that nothing resumes to the bit
        resumed = train(tmp_path / "resumed", words, {"--restore-file": run.path(5)})
        assert differing(run.state()["model"], resumed.state()["model"]) == []
        assert differing(run.state()["last_optimizer_state"], resumed.state()["last_optimizer_state"]) == []
    model, _, _ = hub.load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")
    predicted = fairseq_qn.predict_size(model, parts="float32")
    report = fairseq_qn.save(model, tmp_path / "m.qn.safetensors", parts="float32")
    assert predicted == report.total
    tokens = torch.tensor([[0, 5, 6, 7, 2]])
    for mode in ("dense", "packed"):
        found = hub.load_interface(tmp_path / "m.qn.safetensors", mode).model(tokens)[0]
        torch.testing.assert_close(found, model(tokens)[0], rtol=1e-4, atol=1e-5)
