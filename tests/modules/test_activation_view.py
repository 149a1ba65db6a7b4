"""Inputs of layers that train: noise, ranges, phases, state; from the recipe to the file."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from small import IDS, MODES, Net, assert_answers, loss, recipe
from torch import Tensor, nn
from torch.ao.quantization import MovingAverageMinMaxObserver

import fairseq_qn
from fairseq_qn.errors import MismatchError, RecipeError, UnsupportedError, ViewError
from fairseq_qn.modules.activation_view import RANGE
from fairseq_qn.modules.activations import adopt_ranges, placed
from fairseq_qn.quant.activations import rounded, span
from fairseq_qn.recipe import Recipe

CALLED = ("conv", "mix", "block.fc1", "block.fc2")
STATIC, DYNAMIC = {"ranges": "static"}, {"ranges": "dynamic"}
each_kind = pytest.mark.parametrize("lines", [STATIC, DYNAMIC], ids=["static", "dynamic"])


def made(lines: Any, *names: str, p: Any = 0.5, kind: str = "proxy", seed: int = 0, **net: Any) -> Net:
    model = Net(seed, **net)
    how = {"scheme": "integer", "bits": 8, "activations": lines}
    fairseq_qn.apply(model, recipe(*(names or CALLED), p=p, kind=kind, **how), seed=0)
    return model.train()


def of(model: nn.Module, name: str = "block.fc1") -> Any:
    return dict(placed(model))[name]


def ends(model: nn.Module, name: str = "block.fc1") -> list[float]:
    entry = of(model, name).entry()
    return [entry["low"], entry["high"]]


X = torch.randn(3, 5, 8, generator=torch.manual_seed(0))


@each_kind
def test_training_draws_values_and_evaluation_sees_them_as_they_are(lines: dict[str, str]) -> None:
    model = made(lines)
    fc1 = model.block.fc1
    seen: list[Tensor] = []
    fc1.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for update, layer in [(1, fc1), (1, fc1), (2, fc1)]:
        fairseq_qn.set_update(model, update)
        layer(X)
    first, again, other = seen
    whole = rounded(X, X.min(), X.max(), 8) if lines is STATIC else rounded(X, *span(X, 1), 8)
    assert torch.equal(first, again) and not torch.equal(first, other)
    drawn = first != X
    assert torch.equal(first[drawn], whole[drawn]) and 0.3 < drawn.float().mean() < 0.6
    fairseq_qn.set_update(model, 1)
    of(model).name = "another"
    fc1(X)
    assert not torch.equal(seen.pop(), first), "another layer draws for itself"
    model.eval()
    fc1(X)
    assert torch.equal(seen.pop(), X)
    fairseq_qn.freeze(model)
    fc1(X)
    torch.testing.assert_close(seen.pop(), whole, rtol=1e-6, atol=1e-7)


@each_kind
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_no_noise_and_all_of_it(p: float, lines: dict[str, str]) -> None:
    model = made(lines, p=p)
    fairseq_qn.set_update(model, 0)
    x = X.clone().requires_grad_()
    found = of(model)(x)
    whole = rounded(X, X.min(), X.max(), 8) if lines is STATIC else rounded(X, *span(X, 1), 8)
    assert torch.equal(found, whole if p else X)
    found.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(X))
    without = made(lines, p=1.0, kind="none")
    fairseq_qn.set_update(without, 0)
    assert of(without)(X) is X


@each_kind
def test_training_sees_the_input_before_the_start(lines: dict[str, str]) -> None:
    model = made({**lines, "start": 3}, p=1.0)
    for freeze in (False, True):
        for update in range(5):
            fairseq_qn.set_update(model, update)
            assert (of(model)(X) is X) == (update < 3), (freeze, update)
        fairseq_qn.freeze(model)
    fairseq_qn.set_update(model, 0)
    assert of(model.eval())(X) is not X, "what is frozen is evaluated as it will be stored"


def test_a_static_range_is_the_observers_moving_average() -> None:
    model = made({**STATIC, "momentum": 0.9})
    observer = MovingAverageMinMaxObserver(averaging_constant=0.1)
    for seed in range(6):
        x = (1 + seed) * torch.randn(7, 8, generator=torch.manual_seed(seed))
        of(model)(observer(x))
        torch.testing.assert_close(ends(model), [observer.min_val.item(), observer.max_val.item()])
    before = ends(model)
    for bad in (float("nan"), float("inf")):
        of(model)(torch.tensor([[1e9, bad]]))
    of(model)(torch.empty(0, 8))
    of(model.eval())(1e9 * X)
    assert ends(model) == before
    of(model.train())(-X.abs())
    assert before[0] < ends(model)[0] and 0 < ends(model)[1] < before[1], "0 is always within"


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_is_computed_again_is_seen_once_and_drawn_the_same(reentrant: bool) -> None:
    plain, again = made(STATIC), made(STATIC, recompute=reentrant)
    for model in (plain, again):
        for _ in range(3):
            loss(model).backward()
    assert ends(plain) == ends(again) and ends(plain)[1] > 0
    for name, p in plain.named_parameters():
        torch.testing.assert_close(p.grad, again.get_parameter(name).grad)


@each_kind
@pytest.mark.parametrize("mode", MODES)
def test_the_file_answers_as_the_frozen_model(lines: dict[str, str], mode: str, tmp_path: Path) -> None:
    model = made(lines)
    model(IDS)
    fairseq_qn.freeze(model)
    expected = model.eval()(IDS).detach()
    size = fairseq_qn.predict_size(model, parts="float32")
    assert fairseq_qn.save(model, tmp_path / "m", parts="float32").total == size
    content = fairseq_qn.inspect(tmp_path / "m")
    assert content["version"] == 3 and content["activations"].keys() == {*CALLED}
    assert not [name for name in content["tensors"] if RANGE in name]
    axes = [content["activations"][name].get("axes") for name in ("conv", "block.fc1")]
    assert axes == ([3, 1] if lines is DYNAMIC else [None, None])
    loaded = fairseq_qn.load(tmp_path / "m", mode, Net(1))
    assert_answers(loaded(IDS).detach(), expected, mode)
    assert not torch.equal(expected, plain_answers(model))
    for name in CALLED:
        assert "int8 in" in repr(loaded.get_submodule(name))


def plain_answers(model: Net) -> Tensor:
    """With the weights of the model, and inputs as they are."""
    plain = Net(1).eval()
    plain.load_state_dict(fairseq_qn.decoded_state_dict(model))
    return plain(IDS).detach()


def test_without_an_input_there_is_no_range(tmp_path: Path) -> None:
    model = made(STATIC)
    assert fairseq_qn.predict_size(model) > 0
    fairseq_qn.freeze(model)
    model.eval()
    with pytest.raises(ViewError, match=r"^conv: no input has been seen, and so no range; train with it"):
        model(IDS)
    with pytest.raises(UnsupportedError, match=r"^save: conv: no input has been seen.* or take dynamic"):
        fairseq_qn.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    with torch.no_grad():
        model.train()(IDS)
    model.block.fc2.get_buffer(RANGE).fill_(-1)
    with pytest.raises(UnsupportedError, match=r"^save: block\.fc2: no input"):
        fairseq_qn.save(model, tmp_path / "m")
    fairseq_qn.save(model, tmp_path / "m", drop=["block"])
    assert fairseq_qn.inspect(tmp_path / "m")["activations"].keys() == {"conv", "mix"}
    fairseq_qn.freeze(untrained := made(DYNAMIC).eval())
    assert fairseq_qn.save(untrained, tmp_path / "m").total


def test_a_resumed_loop_ends_the_same_to_the_bit() -> None:
    def start() -> tuple[Net, torch.optim.Optimizer]:
        model = made({**STATIC, "start": 2})
        return model, torch.optim.Adam(model.parameters(), 1e-2)

    def train(model: Net, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        fairseq_qn.Stages(model, optimizer, updates=[4, 5], update=first)
        for _ in range(first, last):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

    whole, optimizer = start()
    keys = list(whole.state_dict())
    train(whole, optimizer, 0, 7)
    part, optimizer = start()
    train(part, optimizer, 0, 3)
    state = copy.deepcopy((part.state_dict(), optimizer.state_dict()))
    resumed, optimizer = start()
    resumed.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train(resumed, optimizer, 3, 7)
    assert keys == list(whole.state_dict()) and "block.fc1.activation_range" in keys
    assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


@each_kind
def test_copies_prints_and_removal(lines: dict[str, str]) -> None:
    model = made(lines)
    loss(model).backward()
    fairseq_qn.freeze(model)
    expected = model.eval()(IDS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(IDS), expected)
        assert of(twin).module is twin.block.fc1
        twin.train()(IDS)
        assert torch.equal(model(IDS), expected), "a copy moves ranges of its own"
    text = repr(model)
    assert text.count("int8, frozen, int8 in") == len(CALLED)
    found = plain_answers(model)
    fairseq_qn.remove(model)
    plain = Net().eval()
    assert repr(model) == repr(plain) and list(model.state_dict()) == list(plain.state_dict())
    assert torch.equal(model(IDS), found)
    for one, other in zip(model.modules(), plain.modules(), strict=True):
        assert one.__dict__.keys() == other.__dict__.keys()
        assert not one._forward_pre_hooks and not one._forward_pre_hooks_with_kwargs


def test_ranges_survive_a_change_of_dtype_and_averages() -> None:
    model, other = made(STATIC), made(STATIC, seed=1)
    for m in (model, other):
        m(IDS)
    low, high = ends(model)
    assert ends(copy.deepcopy(model).half()) == ends(copy.deepcopy(model).bfloat16()) == [low, high]
    both = [m.block.fc1.get_buffer(RANGE).clone() for m in (model, other)]
    model.block.fc1.get_buffer(RANGE).copy_(sum(both) // 2)  # as fairseq averages what is whole
    assert min(low, ends(other)[0]) <= ends(model)[0] <= max(low, ends(other)[0])


def test_state_dicts_of_other_recipes() -> None:
    """From none, and from static ranges to none."""
    static, dynamic = made(STATIC), made(DYNAMIC)
    static(IDS)
    state = dynamic.state_dict()
    adopt_ranges(state, static)
    static.load_state_dict(state)
    state = static.state_dict()
    assert any(RANGE in key for key in state)
    adopt_ranges(state, dynamic)
    dynamic.load_state_dict(state)
    before = ends(static)
    state = made(STATIC, seed=1).state_dict()
    adopt_ranges(state, static)
    static.load_state_dict(state)
    assert before != ends(static) and of(static).is_unseen, "those of the same recipe are taken over"


@pytest.mark.parametrize(
    "value",
    [torch.zeros(3).long(), torch.zeros(2), torch.tensor([-2, 0]), torch.tensor([0, 0x7F800000]), "x",
     torch.tensor([0, 2**40])],
)  # fmt: skip
def test_a_checkpoint_with_no_range_is_refused(value: Any) -> None:
    model = made(STATIC)
    state = {**model.state_dict(), f"block.fc1.{RANGE}": value}
    with pytest.raises(MismatchError, match=r"^block\.fc1: activation_range: expected the bits of two"):
        model.load_state_dict(state)


def test_which_modules_have_an_input() -> None:
    model = made(DYNAMIC, "embed", "block.fc1")
    assert [name for name, _ in placed(model)] == ["block.fc1", "head"], (
        "a table has none, its tied head has"
    )
    model.block.fc1(input=X.requires_grad_()).sum().backward()
    fairseq_qn.freeze(model.eval())
    assert torch.equal(model.block.fc1(input=X), model.block.fc1(X)), "by name as well"
    model = Net()
    model.block.fc1.activation_range = 3
    with pytest.raises(UnsupportedError, match=r"^block\.fc1: the module already has 'activation_range'"):
        fairseq_qn.apply(model, recipe("conv", "block.fc1", scheme="integer", bits=8, activations=STATIC))
    assert not placed(model) and list(model.state_dict()) == list(Net().state_dict())


def test_a_part_and_then_the_whole() -> None:
    model = Net()
    lines = recipe("fc1", scheme="integer", bits=8, activations=STATIC)
    lines["rules"][0]["layers"] = r"(.*\.)?fc1"
    fairseq_qn.apply(model.block, lines)
    first = of(model)
    fairseq_qn.apply(model, lines)
    assert of(model) is first and first.name == "block.fc1"
    assert len(model.block.fc1._forward_pre_hooks) == 2  # the clock's, then this
    model.train()(IDS)
    assert not first.is_unseen


class Told(nn.Module):
    """As fairseq's attention, which reads its projections unless it is told to call them."""

    skip_embed_dim_check = False

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(8, 8)

    def _set_skip_embed_dim_check(self) -> None:
        self.skip_embed_dim_check = True


def test_attention_is_told_to_call_its_projections() -> None:
    for lines in (8, None):
        model = Told()
        rule = {"layers": "q_proj", "scheme": "integer", "activations": lines}
        fairseq_qn.apply(model, {"version": 1, "rules": [rule]})
        assert model.skip_embed_dim_check == (lines is not None)
        fairseq_qn.remove(model)
        assert model.skip_embed_dim_check is False


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        (1, "activations: expected a whole number from 2 to 8, found 1"),
        ("8", "activations: expected a whole number"),
        (True, "activations: expected a whole number"),
        ({"bits": 9}, r"activations\.bits: expected a whole number from 2 to 8, found 9"),
        ({"ranges": "x"}, r"activations\.ranges: expected one of \['static', 'dynamic'\], found 'x'"),
        ({"start": -1}, r"activations\.start: expected a whole number"),
        ({"momentum": 0.9}, r"activations\.momentum: not of dynamic ranges"),
        ({"ranges": "static", "momentum": 1}, r"activations\.momentum: expected a number from 0 to below 1"),
        ({"ranges": "static", "momentum": "x"}, r"activations\.momentum: expected a number"),
        ({"ranges": "static", "momentum": float("nan")}, r"activations\.momentum: expected a number"),
        ({"more": 1}, "activations: unknown more; known: bits, ranges, start, momentum"),
        ([8], "activations: expected a whole number"),
    ],
)
def test_lines_that_are_refused(lines: Any, found: str) -> None:
    with pytest.raises(RecipeError, match=rf"^recipe: rules\[0\]\.{found}"):
        Recipe.load(recipe("conv", scheme="integer", bits=8, activations=lines))


@pytest.mark.parametrize("lines", [8, {}, {"bits": 4, "ranges": "static", "start": 9, "momentum": 0.5}])
def test_lines_go_into_a_checkpoint_and_back(lines: Any) -> None:
    found = Recipe.load(recipe("conv", scheme="integer", bits=8, activations=lines))
    assert Recipe.load(found.to_json()) == found and hash(found.rules[0].activations)
