"""Stages of a plain torch loop: what is due when, by steps and epochs, and the same run after a resume."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small import Net, clock_of, loss, recipe
from torch import Tensor, nn
from torch.optim import Optimizer

import fairseq_qn
from fairseq_qn.errors import MismatchError, NonFiniteWeight, QNError, RecipeError, UnsupportedError
from fairseq_qn.modules.stages import boundaries, due, explain
from fairseq_qn.modules.view import FROZEN, views_of
from fairseq_qn.recipe import Recipe

NAMES = ["emb", "conv", "ffn"]  # the stages of small.recipe, in its order
UPDATES = [2, 3, 5]
LAST = 7
NOISES: dict[str, dict[str, Any]] = {
    "proxy": {"kind": "proxy", "p": [[0, 0.2], [6, 0.8]]},
    "exact, refreshed each 2 updates": {"kind": "exact", "p": 0.5, "refresh": 2},
    "exact, refreshed each epoch": {"kind": "exact", "p": 0.5, "refresh": "epoch"},
}


def build(noise: str = "proxy", seed: int = 0, **more: Any) -> tuple[Net, torch.optim.Adam]:
    model = Net(seed).train()
    fairseq_qn.apply(model, {**recipe(**NOISES[noise]), **more}, seed=seed)
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def update(model: nn.Module, optimizer: Optimizer, passes: int = 1) -> None:
    for _ in range(passes):
        loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def frozen(model: nn.Module) -> list[str]:
    """Stages all of whose layers are frozen, in order; none is so in part."""
    left = {view.rule.stage for view in views_of(model) if view.phase != FROZEN}
    assert not left & {view.rule.stage for view in views_of(model) if view.phase == FROZEN}
    return [name for name in NAMES if name not in left]


def tensors(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield path, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors(value, f"{path}/{key}")


def assert_same(found: tuple[nn.Module, Optimizer], expected: tuple[nn.Module, Optimizer]) -> None:
    """Models with their buffers and optimizers with their moments, to the bit."""
    for a, b in zip(found, expected, strict=True):
        ours, theirs = dict(tensors(a.state_dict())), dict(tensors(b.state_dict()))
        assert ours.keys() == theirs.keys() and ours
        assert [key for key in ours if not ours[key].equal(theirs[key])] == []


# -- what is due


def recipe_of(*stages: Any) -> Recipe:
    return Recipe.load({**recipe(), "stages": [*stages]})


def test_numbers_given_go_before_the_recipes_own() -> None:
    own = recipe_of({"name": "emb", "epoch": 2}, "conv", {"name": "ffn", "update": 7})
    assert boundaries(own) == {"emb": ("epoch", 2), "ffn": ("update", 7)}
    assert boundaries(own, [1, 1, 4]) == {"emb": ("update", 1), "conv": ("update", 1), "ffn": ("update", 4)}
    assert boundaries(own, epochs=range(3)) == {name: ("epoch", i) for i, name in enumerate(NAMES)}
    assert explain(["emb", "conv", "ffn"], boundaries(own)) == (
        "emb is due at epoch 2; ffn is due after update 7; conv: no update or epoch was given"
    )


@pytest.mark.parametrize("numbers", [[], [1, 2], [1, 3, 2], [1, 2, 3, 4], [-1, 2, 3], [1, 2.0, 3], 3, "123"])
def test_numbers_that_do_not_fit_the_stages(numbers: Any) -> None:
    with pytest.raises(RecipeError, match=r"^updates: expected 3 rising numbers, for stages \['emb'"):
        boundaries(recipe_of(*NAMES), numbers)
    with pytest.raises(RecipeError, match="^--there: expected 3 rising numbers"):
        boundaries(recipe_of(*NAMES), None, numbers, ("--here", "--there"))
    with pytest.raises(RecipeError, match="^updates and epochs: give one of the two"):
        boundaries(recipe_of(*NAMES), UPDATES, numbers)


def test_due_is_all_whose_number_is_reached() -> None:
    when = {"a": ("update", 2), "b": ("epoch", 1), "c": ("update", 3)}
    assert [due(when, update=n) for n in range(4)] == [[], [], ["a"], ["a", "c"]]
    assert [due(when, epoch=n) for n in range(3)] == [[], ["b"], ["b"]]
    assert due(when, update=2, epoch=2) == ["a", "b"]


# -- the loop


@pytest.mark.parametrize("passes", [1, 3])
def test_a_stage_is_frozen_after_its_step_and_never_between_passes(passes: int) -> None:
    model, optimizer = build()
    stages = fairseq_qn.Stages(model, optimizer, updates=UPDATES)
    for n in range(1, LAST):
        before = frozen(model)
        for _ in range(passes):
            loss(model).backward()
            assert frozen(model) == before
        optimizer.step()
        assert frozen(model) == [name for name, at in zip(NAMES, UPDATES, strict=True) if n >= at]
        optimizer.zero_grad()
    assert stages.left == [] and {report.stage for report in stages.reports} == {*NAMES}
    assert len(stages.reports) == len(list(views_of(model)))


@pytest.mark.parametrize("noise", NOISES)
def test_as_a_loop_that_does_all_of_it_by_hand(noise: str) -> None:
    """Freezes, moments projected once, exact noise refreshed: set_update and freeze at the right places."""
    model, optimizer = build(noise)
    stages = fairseq_qn.Stages(model, optimizer, updates=UPDATES)
    hand, adam = build(noise)
    fairseq_qn.refresh(hand)
    for n in range(LAST):
        if n % 3 == 0:
            stages.begin_epoch(1 + n // 3)
            if n and NOISES[noise].get("refresh") == "epoch":
                fairseq_qn.refresh(hand)
        for name, at in zip(NAMES, UPDATES, strict=True):
            if n == at:
                fairseq_qn.freeze(hand, name, optimizer=adam)
        for micro in range(2):
            # update 0 would refresh at once what has just been learned
            fairseq_qn.set_update(hand, n, micro) if n else clock_of(hand).pin(0, micro)
            loss(hand).backward()
        adam.step()
        adam.zero_grad()
        update(model, optimizer, passes=2)
    assert_same((model, optimizer), (hand, adam))


def test_the_recipes_own_numbers_and_update_0() -> None:
    stages = [{"name": "emb", "update": 0}, "conv", {"name": "ffn", "update": 1}]
    model, optimizer = build(stages=stages)
    made = fairseq_qn.Stages(model, optimizer)
    assert frozen(model) == ["emb"]
    update(model, optimizer)
    assert frozen(model) == ["emb", "ffn"] and made.left == ["conv"]
    assert str(made) == "update 1: frozen: emb, ffn; not frozen: conv: no update or epoch was given"


def test_epochs_and_one_that_begins_while_gradients_are_accumulated() -> None:
    model, optimizer = build("exact, refreshed each epoch")
    stages = fairseq_qn.Stages(model, optimizer, epochs=[1, 2, 3])
    view = next(view for view in views_of(model) if view.rule.stage == "ffn")
    learned = view.buffer("codes").clone()
    with torch.no_grad():
        view.weight.normal_()
    stages.begin_epoch(1)
    assert frozen(model) == ["emb"] and view.buffer("codes").equal(learned), "learned at this update already"
    update(model, optimizer)
    loss(model).backward()
    stages.begin_epoch(2)
    assert frozen(model) == ["emb"] and view.buffer("codes").equal(learned)
    optimizer.step()
    assert frozen(model) == ["emb", "conv"] and not view.buffer("codes").equal(learned)
    learned = view.buffer("codes").clone()
    update(model, optimizer)
    with torch.no_grad():
        view.weight.normal_()
    stages.begin_epoch(2)
    assert view.buffer("codes").equal(learned), "the epoch has begun before"
    stages.begin_epoch(3)
    assert frozen(model) == NAMES and not view.buffer("codes").equal(learned)


def test_exact_noise_is_refreshed_every_n_steps() -> None:
    model, optimizer = build("exact, refreshed each 2 updates")
    fairseq_qn.Stages(model, optimizer, updates=[9, 9, 9])
    view, codes = next(views_of(model)), []
    for _ in range(6):
        codes.append(view.buffer("codes").clone())
        with torch.no_grad():
            view.weight.normal_()
        update(model, optimizer)
    assert [n for n in range(1, 6) if not codes[n].equal(codes[n - 1])] == [2, 4]


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_leaves_out_do_not_count(fused: bool) -> None:
    """A fused optimizer is called all the same, and leaves the step out itself."""
    model, _ = build()
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    fairseq_qn.Stages(model, optimizer, updates=[2, 2, 2])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for factor, expected in ((1.0, 1), (float("inf"), 1), (1.0, 2)):
        scaler.scale(loss(model) * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert clock_of(model).update == expected and (frozen(model) == NAMES) == (expected == 2)


def test_of_two_optimizers_the_last_leads_and_both_have_their_moments_projected() -> None:
    model, _ = build()
    table = {id(p) for p in model.embed.parameters()}
    first = torch.optim.Adam(model.embed.parameters())
    last = torch.optim.AdamW([p for p in model.parameters() if id(p) not in table])
    fairseq_qn.Stages(model, [first, last], updates=[1, 1, 1])
    loss(model).backward()
    first.step()
    assert frozen(model) == []
    last.step()
    assert frozen(model) == NAMES
    for view in views_of(model):
        moments = (first if id(view.weight) in table else last).state[view.weight]["exp_avg"]
        projected = view.scheme.quantized(moments, view)
        rows = [row for row in range(len(moments)) if row != view.padding_idx]
        torch.testing.assert_close(moments[rows], projected[rows])


def test_other_optimizers_are_left_alone_and_it_is_said_once() -> None:
    model, _ = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    fairseq_qn.Stages(model, optimizer, updates=[1, 2, 3])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(4):
            update(model, optimizer)
    assert len(said) == 1 and "Stages: SGD: no moments of Adam" in str(said[0].message)
    assert frozen(model) == NAMES


# -- resuming


def run(noise: str, by: dict[str, Any], checkpoint: bytes | None = None, seed: int = 0) -> dict[int, bytes]:
    """Train to the end, in epochs of 3 updates of 2 passes; a checkpoint after each update."""
    model, optimizer = build(noise, seed)
    stages = fairseq_qn.Stages(model, optimizer, **by)
    parts, first = {"model": model, "optimizer": optimizer, "stages": stages}, 0
    if checkpoint:
        state = torch.load(io.BytesIO(checkpoint), weights_only=True)
        # in whatever order
        for name in ("stages", "optimizer", "model")[:: 1 if seed % 2 else -1]:
            parts[name].load_state_dict(state[name])
        first = state["stages"]["update"]
    found = {}
    for n in range(first, LAST):
        if n % 3 == 0 or n == first:
            stages.begin_epoch(1 + n // 3)
        update(model, optimizer, passes=2)
        file = io.BytesIO()
        torch.save({name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}, file)
        found[n + 1] = file.getvalue()
    return found


@pytest.mark.parametrize("by", [{"updates": UPDATES}, {"epochs": [1, 2, 3]}], ids=["updates", "epochs"])
@pytest.mark.parametrize("noise", NOISES)
def test_resumed_from_any_update_it_ends_the_same(noise: str, by: dict[str, Any]) -> None:
    """Fresh objects, made from other seeds."""
    straight = run(noise, by)
    expected = dict(tensors(torch.load(io.BytesIO(straight[LAST]), weights_only=True)))
    for n in (2, 3, 5):  # where something is frozen, refreshed, an epoch over
        resumed = run(noise, by, straight[n], seed=n)
        found = dict(tensors(torch.load(io.BytesIO(resumed[LAST]), weights_only=True)))
        assert found.keys() == expected.keys()
        assert [key for key in found if not found[key].equal(expected[key])] == [], n


@pytest.mark.parametrize("how", ["update=", "follow"])
def test_codes_are_not_learned_again_where_update_says_that_training_goes_on(how: str) -> None:
    """Update 2 has a refresh, which was made before the checkpoint was."""
    model, optimizer = build("exact, refreshed each 2 updates")
    fairseq_qn.Stages(model, optimizer, updates=[9, 9, 9])
    for _ in range(2):
        update(model, optimizer)
    codes = {view.name: view.buffer("codes").clone() for view in views_of(model)}
    with torch.no_grad():
        for view in views_of(model):
            view.weight.normal_()
    if how == "follow":
        fairseq_qn.follow(model, optimizer, update=2)
    else:
        fairseq_qn.Stages(model, optimizer, updates=[9, 9, 9], update=2)
    assert all(view.buffer("codes").equal(codes[view.name]) for view in views_of(model))
    for _ in range(2):
        update(model, optimizer)
    assert not any(view.buffer("codes").equal(codes[view.name]) for view in views_of(model)), (
        "at update 4 they are"
    )


GOOD = {"seed": 1, "update": 2, "micro": -1, "epoch": 0, "refreshed": 0}


@pytest.mark.parametrize(
    "state",
    [{}, None, {**GOOD, "more": 1}, {**GOOD, "update": -1}, {**GOOD, "micro": -2}, {**GOOD, "seed": "x"},
     {**GOOD, "update": True}, {**GOOD, "epoch": torch.tensor(1)}],
)  # fmt: skip
def test_a_state_that_is_none_changes_nothing(state: Any) -> None:
    stages = fairseq_qn.Stages(*build(), updates=UPDATES)
    before = stages.state_dict()
    with pytest.raises(MismatchError, match="^Stages: expected what state_dict gave") as error:
        stages.load_state_dict(state)
    assert "\n" not in str(error.value) and stages.state_dict() == before
    stages.load_state_dict(GOOD)
    assert stages.state_dict() == GOOD


# -- errors


def test_what_cannot_have_stages_is_refused() -> None:
    model, optimizer = build()
    twins = nn.ModuleList([build()[0], build()[0]])
    cases: list[tuple[type[QNError], str, Any, Any, dict[str, Any]]] = [
        (UnsupportedError, "^Stages: expected a model that", nn.Linear(2, 2), optimizer, {}),
        (UnsupportedError, "^Stages: .*and dict", model, {}, {}),
        (UnsupportedError, "^Stages: .*and 0 optimizers", model, [], {}),
        (UnsupportedError, "^Stages: .*found 2 such parts", twins, optimizer, {"updates": UPDATES}),
        (RecipeError, "^Stages: nothing says when emb, conv, ffn are frozen", model, optimizer, {}),
        (RecipeError, "^Stages: updates: expected 3 rising", model, optimizer, {"updates": [1]}),
        (RecipeError, "^Stages: updates and Stages: epochs: give one", model, optimizer,
         {"updates": UPDATES, "epochs": UPDATES}),
    ]  # fmt: skip
    for kind, message, module, optimizers, options in cases:
        with pytest.raises(kind, match=message):
            fairseq_qn.Stages(module, optimizers, **options)
    assert clock_of(model).followed is None


def test_nan_in_a_weight_comes_out_of_the_step_and_freezes_nothing() -> None:
    model, optimizer = build()
    fairseq_qn.Stages(model, optimizer, updates=[1, 1, 1])
    loss(model).backward()
    with torch.no_grad():
        model.get_parameter("conv.weight")[0] = float("nan")
    with pytest.raises(NonFiniteWeight, match="^conv.weight: "):
        optimizer.step()
    assert frozen(model) == ["emb"]
