"""A training that is killed and resumed ends bit-identical to one that was not: model, buffers, optimizer,
schedule.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq_run import (
    EACH,
    MLM,
    PLUGIN,
    ROOT,
    Run,
    arguments,
    differing,
    recipe,
    together,
    train,
    write_recipe,
)

from fairseq_qn.modules.view import views_of

LAST = 10  # updates; an epoch has 8 at --update-freq 2
NOISES = {
    "proxy": {"kind": "proxy", "p": 0.2},
    "exact, refreshed each epoch": {"kind": "exact", "p": 0.2, "refresh": "epoch"},
    "exact, refreshed each 2 updates": {"kind": "exact", "p": [[0, 0.1], [8, 0.5]], "refresh": 2},
}
STAGES = {"updates": {"--quant-stage-updates": "3,4,7"}, "epochs": {"--quant-stage-epochs": "1,2,2"}}
CASES = [*((noise, "updates") for noise in NOISES), ("exact, refreshed each epoch", "epochs")]


def common(folder: Path, noise: str, stages: str) -> list[str]:
    content = recipe(NOISES[noise])
    return arguments(MLM, {"--update-freq": 2, "--max-update": LAST}, STAGES[stages],
                     {"--quant-recipe": write_recipe(folder / "recipe.yaml", content)})  # fmt: skip


def kept(state: dict) -> dict:
    """What has to be equal at the end: weights and buffers, optimizer with its steps and moments, schedule,
    counters.
    """
    history = dict(state["optimizer_history"][-1])  # fairseq adds an entry at each resume
    # the best loss so far, which fairseq's checkpoint of an epoch's end lacks
    history["lr_scheduler_state"] = None
    iterator = {key: state["extra_state"]["train_iterator"][key] for key in ("epoch", "iterations_in_epoch")}
    return {
        "model": state["model"],
        "optimizer": state["last_optimizer_state"],
        "history": history,
        "iterator": iterator,
    }


@pytest.fixture(scope="module", params=CASES, ids=", ".join)
def straight(request, data, tmp_path_factory) -> tuple[Run, list[str]]:
    """An uninterrupted run with a checkpoint after each update, and its words."""
    folder = tmp_path_factory.mktemp("straight")
    words = [str(data.lm), *common(folder, *request.param)]
    return train(folder, words, EACH), words


def test_resumed_from_any_update(straight: tuple[Run, list[str]], tmp_path: Path) -> None:
    run, words = straight
    expected = kept(run.at(LAST))
    assert expected["iterator"]["epoch"] == 2, "an epoch boundary lies within"
    wrong = {}
    for update in range(1, LAST):
        resumed = train(tmp_path / str(update), words, {"--restore-file": run.path(update)})
        losses = [[figures["loss"] for figures in r.logged()] for r in (run, resumed)]
        assert losses[1] == losses[0][update:], f"the losses after a resume at {update}"
        wrong[update] = differing(expected, kept(resumed.state()))
    assert wrong == {update: [] for update in range(1, LAST)}


def test_moments_became_those_of_codewords_at_each_freeze(straight: tuple[Run, list[str]]) -> None:
    """So that the resumes above cross it: from the update of the freeze on a codeword's blocks share Adam's
    moments.
    """
    run, words = straight
    by_epoch = "--quant-stage-epochs" in words
    frozen = {"ffn": 0 if by_epoch else 3, "emb": 8 if by_epoch else 4, "attn": 8 if by_epoch else 7}
    positions = {id(parameter): i for i, parameter in enumerate(run.model.parameters())}
    for update in range(1, LAST + 1):
        moments = run.at(update)["last_optimizer_state"]["state"]
        for view in views_of(run.model):
            shared = together(moments[positions[id(view.weight)]]["exp_avg_sq"], view)
            assert shared == (update > frozen[view.rule.stage]), (update, view.name)


def test_the_comparison_sees_a_difference(straight: tuple[Run, list[str]]) -> None:
    run, _ = straight
    one, other = kept(run.at(LAST)), kept(run.at(LAST))
    other["model"]["encoder.sentence_encoder.layers.0.fc1.weight"][0, 0] += 1e-7
    assert len(differing(one, other)) == 1
    assert differing(kept(run.at(LAST - 1)), one)


# fairseq-train; as many threads as in this process, so that sums of floats come out the same
COMMAND = "import torch; torch.set_num_threads(1); from fairseq_cli import train; train.cli_main()"
KILLING = """
import os, signal
import fairseq_qn
from fairseq_qn.tasks.fairseq_tasks import QNMaskedLMTask
step, calls = QNMaskedLMTask.train_step, []
def killing(self, sample, model, criterion, optimizer, update_num, **rest):
    if update_num == 5 and calls and calls[-1] == 5:  # the second micro-batch of an update
        os.kill(os.getpid(), signal.SIGKILL)
    calls.append(update_num)
    return step(self, sample, model, criterion, optimizer, update_num, **rest)
QNMaskedLMTask.train_step = killing
"""


def test_killed_in_the_middle_of_an_update(data, tmp_path: Path) -> None:
    """A real SIGKILL, and the same command again, which finds checkpoint_last.pt by itself."""
    words = [
        str(data.lm),
        *common(tmp_path, "exact, refreshed each epoch", "updates"),
        "--save-interval-updates",
        "2",
    ]
    straight = train(tmp_path / "straight", words)
    folder = tmp_path / "killed"

    def fresh(code: str) -> tuple[int, dict]:
        options = arguments(words, {"--save-dir": folder, "--cpu": None, "--user-dir": PLUGIN})
        call = [sys.executable, "-c", code, *options]
        done = subprocess.run(call, cwd=ROOT, capture_output=True, timeout=300, check=False)
        assert done.returncode in (0, -9), done.stderr[-2000:]
        return done.returncode, torch.load(folder / "checkpoint_last.pt", weights_only=True)

    status, state = fresh(f"{KILLING}\n{COMMAND}")
    assert (status, state["optimizer_history"][-1]["num_updates"]) == (-9, 4)
    status, state = fresh(COMMAND)
    assert (status, differing(kept(straight.state()), kept(state))) == (0, [])
