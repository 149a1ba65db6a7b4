"""A scheme that only this test registers, by fairseq's own loop, up to the answers of its file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fairseq_run import EACH, MLM, STAGES, differing, train, write_recipe
from toy import Toy

import fairseq_qn
from fairseq_qn import hub
from fairseq_qn.modules.packed import Packed
from fairseq_qn.modules.view import FROZEN, views_of
from fairseq_qn.schemes import SCHEMES

LAYERS = {"ffn": r".*\.fc[12]", "emb": ".*embed_tokens", "attn": r".*attn\.(q|k|v|out)_proj"}


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    SCHEMES["toy"] = Toy
    yield
    del SCHEMES["toy"]


@pytest.mark.parametrize("kind", ["proxy", "exact"])
def test_it_trains_freezes_resumes_ships_and_answers(kind: str, data, tmp_path: Path) -> None:
    rules = [{"layers": LAYERS[stage], "scheme": "toy", "stage": stage} for stage in STAGES]
    recipe = {"version": 1, "noise": {"kind": kind, "p": 0.2}, "rules": rules, "stages": [*STAGES]}
    options = {"--quant-recipe": write_recipe(tmp_path / "recipe.yaml", recipe), "--max-update": 8}
    words = [str(data.lm), MLM, options, {"--quant-stage-updates": "2,4,6"}]
    run = train(tmp_path / "run", words, EACH)
    assert all(view.phase == FROZEN and isinstance(view.scheme, Toy) for view in views_of(run.model))
    spared = run.trainer.optimizer.optimizer._qn_spared.parts.values()
    assert {id(p) for p, *_ in spared} == {id(view.parameter("gain")) for view in views_of(run.model)}
    resumed = train(tmp_path / "resumed", words, {"--restore-file": run.path(5)})
    assert differing(run.state()["model"], resumed.state()["model"]) == []
    assert differing(run.state()["last_optimizer_state"], resumed.state()["last_optimizer_state"]) == []
    model, _, _ = hub.load_checkpoint(tmp_path / "run" / "checkpoint_last.pt")
    fairseq_qn.save(model, tmp_path / "m.qn.safetensors", parts="float32")
    tokens = torch.tensor([[0, 5, 6, 7, 2]])
    expected = run.model(tokens)[0]
    for mode in ("dense", "packed"):
        interface = hub.load_interface(tmp_path / "m.qn.safetensors", mode)
        found = interface.model(tokens)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        packed = sum(isinstance(module, Packed) for module in interface.modules())
        assert packed == (len(list(views_of(run.model))) if mode == "packed" else 0)
