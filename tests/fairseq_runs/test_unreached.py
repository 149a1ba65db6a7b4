"""Asked to quantise, it does, or says that it did not; and scores count from the last stage on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_run import CLASSES, LANGUAGE, MLM, PAIRS, Run, build, listening, recipe, train, write_recipe

import fairseq_qn
from fairseq_qn import hub
from fairseq_qn.errors import QNError, RecipeError, UnsupportedError
from fairseq_qn.modules.view import FROZEN, views_of

BRIEF = {"--batch-size": 48}  # 3 updates an epoch
STANDING_STILL = {"--lr": 0, "--end-learning-rate": 0}
ENOUGH = {"--patience": 1, "--quant-stage-epochs": "2,3,3", "--max-epoch": 8}
NO_BETTER = {
    "a loss that stands still": STANDING_STILL,
    "a loss that falls, the highest wanted": {"--maximize-best-checkpoint-metric": None},
}


def staged(folder: Path, **more: Any) -> dict[str, Path]:
    return {"--quant-recipe": write_recipe(folder / "r.yaml", recipe(**more))}


def all_frozen(run: Run, name: str) -> bool:
    phases = [int(value) for key, value in run.state(name)["model"].items() if key.endswith("phase")]
    return len(phases) == 13 and set(phases) == {FROZEN}


@pytest.fixture(scope="module", params=NO_BETTER)
def patient(request, data, tmp_path_factory) -> tuple[Run, dict]:
    """No validation is better than the one before, by fairseq's own count a reason to stop after the second
    epoch.
    """
    folder = tmp_path_factory.mktemp("patient")
    words = {**BRIEF, **ENOUGH, **NO_BETTER[request.param], **staged(folder)}
    return train(folder, data.lm, MLM, words), words


def test_scores_count_from_the_last_stage_on(patient: tuple[Run, dict], data, tmp_path: Path) -> None:
    """Straight, and resumed from before the last stage: the first epoch that counts is 3, the second stops
    the training.
    """
    run, words = patient
    again = {"--restore-file": run.folder / "checkpoint2.pt"}
    for each in (run, *([train(tmp_path, data.lm, MLM, words, again)] if "--lr" in words else [])):
        scores = {int(log["epoch"]): log["valid_loss"] for log in each.logged("valid")}
        assert max(scores) == 4 and all(map(torch.isfinite, torch.tensor(list(scores.values()))))
        assert all_frozen(each, "checkpoint_best.pt") and each.state()["extra_state"]["best"] == scores[3]
        assert not any("best" in text and "Infinity" in text for _, text in each.lines)
    for epoch in (1, 2):
        assert not {"best"} & set(run.state(f"checkpoint{epoch}.pt")["extra_state"])


def test_a_stage_without_a_learning_rate_is_said(patient: tuple[Run, dict]) -> None:
    run, words = patient
    said = [text.partition("stages ")[2] for _, text in run.lines if "learning rate of 0" in text]
    assert said == (["ffn", "emb, attn"] if "--lr" in words else [])


def test_a_score_of_before_the_stages_does_not_count(data, tmp_path: Path) -> None:
    """A dense training is continued in stages: no quantised model would ever beat its best."""
    dense = train(tmp_path / "dense", data.lm, MLM, BRIEF, staged(tmp_path), {"--max-epoch": 1})
    state = dense.state()
    assert (dense.folder / "checkpoint_best.pt").exists(), "without stages to come a score counts at once"
    state["extra_state"]["best"] = -1e9
    torch.save(state, tmp_path / "unbeatable.pt")
    options = {
        "--restore-file": tmp_path / "unbeatable.pt",
        "--quant-stage-epochs": "2,2,2",
        "--max-epoch": 2,
    }
    run = train(tmp_path / "stages", data.lm, MLM, BRIEF, staged(tmp_path), options)
    assert all_frozen(run, "checkpoint_best.pt")


ENDS = {
    "updates, an end in epochs": (
        {"--quant-stage-updates": "1,2,39", "--max-epoch": 1},
        "attn is due after update 39",
    ),
    "epochs, an end in updates": (
        {"--quant-stage-epochs": "1,1,9", "--max-update": 2},
        "attn is due at epoch 9",
    ),
    "time": (
        {"--quant-stage-updates": "1,3,3", "--max-epoch": 9, "--stop-time-hours": 1e-9},
        "ffn is due after update 1; emb is due after update 3; attn is due after update 3",
    ),
    "no stages": ({"--max-epoch": 1}, "ffn, emb, attn: no update or epoch was given"),
    "all frozen": ({"--quant-stage-updates": "0,1,2", "--max-epoch": 1}, None),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_is_unfrozen_at_the_end_is_said(name: str, data, tmp_path: Path) -> None:
    options, why = ENDS[name]
    run = train(tmp_path, data.lm, MLM, BRIEF, staged(tmp_path), options)
    said = [text for _, text in run.lines if "not frozen at update" in text]
    updates = run.trainer.get_num_updates()
    assert [text.partition("update ")[2] for text in said] == ([f"{updates}: {why}"] if why else [])


OPTIONS = [{"--quant-stage-updates": "1,2,3"}, {"--quant-stage-epochs": "1,2,3"}, {"--quant-iterations": 7}]


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: next(iter(option)))
def test_stages_of_no_recipe(option: dict, data) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(option))}: there is no recipe"):
        build(data.lm, MLM, option)


def test_stages_of_the_short_recipe(data) -> None:
    build(data.lm, MLM, OPTIONS[0], OPTIONS[2], {"--quant-noise-pq": 0.1})


STOCK = [("roberta", "pq"), ("roberta", "scalar"), ("transformer_lm", "pq"), ("transformer", "pq")]


@pytest.mark.parametrize(("arch", "kind"), STOCK)
def test_noise_with_a_stock_architecture(arch: str, kind: str, data) -> None:
    words = {"roberta": MLM, "transformer_lm": LANGUAGE, "transformer": PAIRS}[arch]
    folder, option = data.pairs if arch == "transformer" else data.lm, f"--quant-noise-{kind}"
    with pytest.raises(UnsupportedError, match=f"{option}: .*; use .* --arch qn_{arch}"):
        build(folder, words, {"--arch": arch, option: 0.1})


def test_stages_after_the_learning_rate(data, tmp_path: Path) -> None:
    """At 6 it is 0 for good. By epochs it is not known beforehand."""
    decay = {"--total-num-update": 6, **BRIEF, **staged(tmp_path)}
    late = {"--quant-stage-updates": "3,4,6"}
    with pytest.raises(QNError, match=r"stage attn: update 6: .*--total-num-update") as error:
        train(tmp_path / "refused", data.lm, MLM, decay, late, {"--max-update": 8})
    assert len(str(error.value)) <= 300 and "\n" not in str(error.value)
    # never frozen; still trained
    for more in ({"--max-update": 6}, {"--max-update": 8, "--end-learning-rate": 1e-5}):
        build(data.lm, MLM, decay, late, more)
    run = train(tmp_path, data.lm, MLM, decay, {"--quant-stage-epochs": "1,3,3", "--max-epoch": 3})
    assert [text for _, text in run.lines if "learning rate of 0" in text] == [
        "update 6: frozen at a learning rate of 0, so nothing is trained after: stages emb, attn"
    ]


@pytest.mark.parametrize(("task", "said"), [("masked_lm", ["qn_masked_lm"]), ("qn_masked_lm", [])])
def test_a_stock_task_says_that_it_has_no_stages(task: str, said: list[str], data) -> None:
    """Once, when the training begins."""
    lines: list[tuple[str, str]] = []
    with listening(lines):
        model = build(data.lm, {**MLM, "--task": task, "--quant-noise-pq": 0.1}).model
        assert not any("freezes no stage" in text for _, text in lines)
        model.eval().train().train()
    assert [text.split()[-1] for _, text in lines if "freezes no stage" in text] == said


def drawn(model: torch.nn.Module) -> torch.Tensor:
    """Which weights read as zero in update 7, but for the row of the padding, which begins as zeros."""
    fairseq_qn.set_update(model.train(), 7)
    return torch.cat([view.home.weight.detach()[2:].eq(0).flatten() for view in views_of(model)])


@pytest.mark.parametrize("words", [MLM, LANGUAGE, PAIRS, CLASSES], ids=lambda words: words["--task"])
def test_the_seed_is_fairseqs(words: dict, data, tmp_path: Path) -> None:
    folder = {"qn_translation": data.pairs, "qn_sentence_prediction": data.classes}.get(
        words["--task"], data.lm
    )
    model = build(folder, words, staged(tmp_path), {"--seed": 4}).model
    assert {view.clock.seed for view in views_of(model)} == {4}


def test_a_translation_draws_the_same_noise_again(data, tmp_path: Path) -> None:
    """In another process by the same command, as on resume, and from a checkpoint's configuration alone."""
    words = {**PAIRS, **staged(tmp_path, noise={"kind": "proxy", "p": 0.5})}
    again, other = (drawn(build(data.pairs, words, {"--seed": seed}).model) for seed in (4, 3))
    run = train(tmp_path, data.pairs, words, {"--seed": 4, "--max-update": 1})
    loaded, config, _ = hub.load_checkpoint(run.folder / "checkpoint_last.pt")
    assert config.common.seed == 4
    assert drawn(run.model).equal(again) and drawn(loaded).equal(again) and not again.equal(other)
