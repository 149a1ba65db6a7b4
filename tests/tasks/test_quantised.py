"""fairseq's task and a plain loop freeze the same stages at the same updates: equal weights, to the bit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small import Net, clock_of, loss, recipe

pytest.importorskip("fairseq")

import fairseq_qn
from fairseq_qn.modules.view import FROZEN, views_of
from fairseq_qn.recipe import Recipe
from fairseq_qn.tasks import stages
from fairseq_qn.tasks.quantised import QuantisedTask


class Task:
    """What the mixin asks of fairseq's."""

    cfg = SimpleNamespace(quant_iterations=20, quant_keep_moments=False, **dict.fromkeys(
        ("quant_stage_updates", "quant_stage_epochs")))  # fmt: skip

    def begin_epoch(self, epoch: int, model: Net) -> None:
        pass

    def train_step(self, sample: Any, model: Net, *rest: Any) -> None:
        loss(model).backward()


class QNTask(QuantisedTask, Task):
    """The mixin, over as little as can be."""


NOISES = [
    {"kind": "proxy", "p": 0.3},
    {"kind": "exact", "p": 0.5, "refresh": 2},
    {"kind": "exact", "p": 0.5, "refresh": "epoch"},
]
STAGES = {
    "updates": ["emb", {"name": "conv", "update": 2}, {"name": "ffn", "update": 4}],
    "from 0": [{"name": "emb", "update": 0}, {"name": "conv", "update": 3}, {"name": "ffn", "update": 3}],
    "epochs": [{"name": "emb", "epoch": 1}, {"name": "conv", "epoch": 3}, {"name": "ffn", "epoch": 2}],
    "both": [{"name": "emb", "epoch": 2}, {"name": "conv", "update": 5}, {"name": "ffn", "update": 3}],
}


@pytest.mark.parametrize("when", STAGES)
@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: f"{noise['kind']}, {noise.get('refresh')}")
def test_the_task_freezes_as_a_plain_loop_does(noise: dict[str, Any], when: str) -> None:
    plain, theirs, seen = [], [], []
    for found in (plain, theirs):
        model = Net().train()
        fairseq_qn.apply(model, {**recipe(**noise), "stages": STAGES[when]}, seed=0)
        found += [model, torch.optim.Adam(model.parameters(), lr=0.01)]

    model, optimizer = plain
    made = fairseq_qn.Stages(model, optimizer)
    task, wrapped = QNTask(), SimpleNamespace(optimizer=theirs[1], get_lr=lambda: 0.01)
    task.boundaries = stages.boundaries(Recipe.load(clock_of(theirs[0]).recipe.to_dict()), task.cfg)
    assert task.boundaries == made.boundaries
    for n in range(6):
        if n % 2 == 0:
            made.begin_epoch(1 + n // 2)
            task.begin_epoch(1 + n // 2, theirs[0])
        for _ in range(2):
            loss(model).backward()
            task.train_step(None, theirs[0], None, wrapped, n)
            phases = [[view.phase == FROZEN for view in views_of(net)] for net in (model, theirs[0])]
            assert phases[0] == phases[1], n
        for adam in (optimizer, theirs[1]):
            adam.step()
            adam.zero_grad()
        seen.append(sum(phases[0]))
    ours, its = model.state_dict(), theirs[0].state_dict()
    assert [key for key in ours if not ours[key].equal(its[key])] == []
    assert len({*seen}) > 1 and seen[-1] >= 8


def test_options_are_the_numbers_of_a_plain_loop() -> None:
    """The options of the command line give the boundaries that the numbers of a plain loop give."""
    config = SimpleNamespace(quant_stage_updates="[1, 2, 3]", quant_stage_epochs=None)
    model = Net()
    fairseq_qn.apply(model, recipe())
    plain = fairseq_qn.Stages(model, torch.optim.Adam(model.parameters()), updates=[1, 2, 3])
    assert stages.boundaries(Recipe.load(recipe()), config) == plain.boundaries
