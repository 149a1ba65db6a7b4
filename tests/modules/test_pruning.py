"""Layers left out: what is left answers as before, shares as before, and is what the file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import IDS, answers, assert_answers, loss
from stacks import Stacked, keep, recipe, share, through
from torch import nn

import fairseq_qn
from fairseq_qn.errors import MismatchError, NoLayerMatched, RecipeError, UnsupportedError
from fairseq_qn.modules.match import owners_of
from fairseq_qn.modules.pruning import pruned_state
from fairseq_qn.modules.sharing import places


@st.composite
def kept(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """(depth, chunk of adjacent layers that share or 1, layers to keep)."""
    depth = draw(st.integers(1, 6))
    numbers = draw(st.sets(st.integers(0, depth - 1), min_size=1))
    return depth, draw(st.integers(1, 4)), sorted(numbers)


def frozen(depth: int, chunk: int, **more: Any) -> Stacked:
    model = Stacked(depth)
    fairseq_qn.apply(model, recipe(**({"share": share(chunk)} if chunk > 1 else {}), **more), seed=0)
    fairseq_qn.freeze(model, iterations=2)
    return model.eval()


@settings(deadline=None, max_examples=20)
@given(case=kept())
def test_what_is_left_is_what_the_file_holds(case: tuple[int, int, list[int]], tmp_path_factory) -> None:
    depth, chunk, numbers = case
    model = frozen(depth, chunk)
    whole, wanted = answers(model), through(model, numbers)
    left = fairseq_qn.prune(model, numbers)
    assert answers(left).equal(wanted)
    assert answers(model).equal(whole) and len(model.layers) == model.num_layers == depth
    assert [left.layers[i] for i in range(len(numbers))] == [model.layers[n] for n in numbers]
    last = f"layers.{len(numbers) - 1}.fc1.weight"
    assert left.get_parameter(last) is model.get_parameter(f"layers.{numbers[-1]}.fc1.weight")
    path = tmp_path_factory.mktemp("pruned") / "a.qn.safetensors"
    predicted = fairseq_qn.predict_size(left, parts="float32")
    size = fairseq_qn.save(left, path, parts="float32")
    assert size.total == predicted == path.stat().st_size
    stored = {int(name.split(".")[1]) for name in size.layers if name.startswith("layers")}
    assert len(stored) == len({n // chunk for n in numbers}) and max(stored) < len(numbers)
    for mode in ("dense", "packed"):
        loaded = fairseq_qn.load(path, mode, Stacked(len(numbers), seed=9))
        assert_answers(answers(loaded), wanted, mode)
    with pytest.raises(MismatchError):
        fairseq_qn.load(path, model=Stacked(len(numbers) + 1))


def test_every_other_of_layers_and_of_chunks() -> None:
    """Fan et al. 2020, Table 2: to prune a shared model halves it, so chunks go."""
    for chunk, wanted in ((1, [0, 2, 4]), (2, [0, 1, 4, 5]), (3, [0, 1, 2, 6])):
        model = Stacked(6 if chunk < 3 else 7)
        if chunk > 1:
            fairseq_qn.share(model.layers, chunk)
        left = fairseq_qn.prune(model, "every_other")
        assert places(left.layers).numbers == tuple(wanted)
        assert places(fairseq_qn.prune(left, "every_other").layers).numbers == tuple(wanted)
        assert left.num_layers == len(wanted)


def test_what_is_left_of_a_chunk_loads_as_the_first_of_it() -> None:
    model, source = Stacked(4), Stacked(3, seed=1)
    fairseq_qn.share(model.layers, 2)
    left = fairseq_qn.prune(model, [1, 2, 3])
    left.load_state_dict(source.state_dict())
    assert [left.layers[i].fc1.bias.equal(source.layers[i].fc1.bias) for i in range(3)] == [
        True,
        True,
        False,
    ]
    assert left.layers[2].fc1.bias.equal(source.layers[1].fc1.bias)


def test_layers_keep_their_numbers() -> None:
    left = fairseq_qn.prune(fairseq_qn.prune(Stacked(6), [1, 3, 4, 5]), [3, 5])
    assert places(left.layers).numbers == (3, 5)
    fairseq_qn.share(left.layers, 4)  # 3 is of the first four, 5 is not
    assert len(owners_of(left)) == len(owners_of(Stacked(2)))
    with pytest.raises(UnsupportedError, match="layers: expected layers out of 3, 5, found 4"):
        fairseq_qn.prune(left, [4, 5])


def test_the_recipe_prunes_what_is_saved(tmp_path: Path) -> None:
    """Training has all layers; what was pruned by hand is not pruned again."""
    model = frozen(6, 2, prune=keep("every_other"))
    assert len(model.layers) == 6
    size = fairseq_qn.save(model, tmp_path / "a.qn.safetensors", parts="float32")
    assert size.total == fairseq_qn.predict_size(model, parts="float32")
    assert size.total == round(fairseq_qn.figures(model, parts="float32")["predicted_mb"] * 1e6)
    loaded = fairseq_qn.load(tmp_path / "a.qn.safetensors", model=Stacked(4))
    assert answers(loaded).equal(through(model, [0, 1, 4, 5])) and len(model.layers) == 6
    fairseq_qn.save(fairseq_qn.prune(model, [2, 5]), tmp_path / "b.qn.safetensors", parts="float32")
    loaded = fairseq_qn.load(tmp_path / "b.qn.safetensors", model=Stacked(2))
    assert answers(loaded).equal(through(model, [2, 5]))
    all_of_them = fairseq_qn.prune(model, [*range(6)])
    fairseq_qn.save(all_of_them, tmp_path / "c.qn.safetensors", parts="float32")
    assert answers(fairseq_qn.load(tmp_path / "c.qn.safetensors", model=Stacked(6))).equal(answers(model))


def test_layers_that_go_need_not_be_frozen(tmp_path: Path) -> None:
    rules = recipe()["rules"]
    lines = [{**r, "layers": rf"layers\.{n}\.{r['layers']}", "stage": str(n)} for n in (0, 1) for r in rules]
    model = Stacked(2)
    fairseq_qn.apply(model, {"version": 1, "rules": lines})
    fairseq_qn.freeze(model, "1")
    with pytest.raises(UnsupportedError, match="not frozen"):
        fairseq_qn.save(model, tmp_path / "a.qn.safetensors")
    fairseq_qn.save(fairseq_qn.prune(model, [1]), tmp_path / "a.qn.safetensors")


WRONG = {
    "too many": ([0, 6], UnsupportedError, "0 to 5, found 6"),
    "not rising": ([2, 0], RecipeError, "rising"),
    "twice": ([1, 1], RecipeError, "rising"),
    "none": ([], RecipeError, "rising"),
    "a word": ("each", RecipeError, "every_other"),
    "below 0": ([-1], RecipeError, "rising"),
    "truth": ([True], RecipeError, "rising"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_kept(name: str) -> None:
    which, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        fairseq_qn.prune(Stacked(6), which)
    with pytest.raises(kind, match=message):
        fairseq_qn.apply(Stacked(6), recipe(prune=keep(which)))


def test_a_stack_that_there_is_not() -> None:
    for call in (
        lambda: fairseq_qn.prune(Stacked(2), [0], "decoder.layers"),
        lambda: fairseq_qn.sensitivity(Stacked(2), lambda model: 0.0, "decoder.layers"),
        lambda: fairseq_qn.apply(Stacked(2), recipe(prune=[{"layers": "decoder", "keep": [0]}])),
    ):
        with pytest.raises(NoLayerMatched, match="decoder.*stacks: layers"):
            call()
    with pytest.raises(UnsupportedError, match="prune: the model carries no recipe"):
        fairseq_qn.prune(Stacked(2))


def test_sensitivity_is_the_rise_of_what_is_measured() -> None:
    model = fairseq_qn.prune(Stacked(5), [0, 1, 3, 4]).eval()
    asked: list[bool] = []

    def measure(model: nn.Module) -> float:
        asked.append(torch.is_grad_enabled())
        return loss(model).item()

    found = fairseq_qn.sensitivity(model, measure)
    whole = Stacked(5).eval()
    by_hand = {}
    for number in (0, 1, 3, 4):
        left = fairseq_qn.prune(whole, [n for n in (0, 1, 3, 4) if n != number])
        by_hand[number] = loss(left).item() - loss(model).item()
    assert found == {"layers": pytest.approx(by_hand)} and asked == [False] * 5
    assert len({*by_hand.values()}) == 4 and len(model.layers) == 4


@settings(deadline=None, max_examples=20)
@given(case=kept())
def test_a_state_dict_of_the_whole_loads(case: tuple[int, int, list[int]]) -> None:
    """Codes of a chunk go to the first of its layers that is left."""
    depth, chunk, numbers = case
    model = frozen(depth, chunk)
    student = fairseq_qn.prune(Stacked(depth, seed=5), numbers)
    fairseq_qn.apply(student, recipe(**({"share": share(chunk)} if chunk > 1 else {})), seed=0)
    state = pruned_state(model.state_dict(), "layers.", student.layers)
    student.load_state_dict(state)
    assert answers(student.eval()).equal(through(model, numbers))
    again = pruned_state(student.state_dict(), "layers.", student.layers)
    assert again.keys() == student.state_dict().keys(), "pruned already"


def test_a_layer_to_keep_that_the_state_lacks() -> None:
    student = fairseq_qn.prune(Stacked(6), [0, 5])
    with pytest.raises(MismatchError, match=r"layers\.5.*has 4 layers"):
        pruned_state(Stacked(4).state_dict(), "layers.", student.layers)


def test_a_pruned_model_trains() -> None:
    """Pruned before `apply`, it is a model as any other: its layers' names are its own."""
    model = Stacked(4)
    left = fairseq_qn.prune(model, "every_other").train()
    fairseq_qn.apply(left, recipe(p=0.5), seed=0)
    other = Stacked(2).train()
    other.load_state_dict(pruned_state(model.state_dict(), "layers.", left.layers), strict=False)
    fairseq_qn.apply(other, recipe(p=0.5), seed=0)
    assert left(IDS).equal(other(IDS))
    assert left.get_parameter("layers.1.fc1.weight") is model.layers[2].fc1._parameters["weight"]
