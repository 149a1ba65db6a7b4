"""Averaging breaks codes and phases: what is then wrong is refused by name, whatever averaged it, and what
is right is not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import IDS, Net, recipe
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import fairseq_qn
from fairseq_qn.errors import MismatchError, ViewError
from fairseq_qn.modules.adopt import adopt
from fairseq_qn.modules.view import CODED, FROZEN, views_of

State = dict[str, Tensor]
SAID = "its phase and codes are not those of its digest: codes cannot be averaged; load a single checkpoint"
RULES = {
    "product": {"k": 16},
    "many": {"k": 300, "block_size": 1},
    "integer": {"scheme": "integer", "bits": 4},
}


def made(phase: int, seed: int = 0, kind: str = "product") -> Net:
    """many: of more weights, so that two layers have codes of int32."""
    model = Net(seed)
    if kind == "many":
        model.block.fc1, model.block.fc2 = nn.Linear(8, 64), nn.Linear(64, 8)
    fairseq_qn.apply(model, recipe(kind="exact", p=0.5, **RULES[kind]))
    if phase == CODED:
        fairseq_qn.refresh(model)
    elif phase == FROZEN:
        fairseq_qn.freeze(model)
    return model.eval()


def mean(states: list[State]) -> State:
    """What fairseq's scripts/average_checkpoints.py computes: sums in the tensors' own dtype (fp16 in fp32),
    then / or //.
    """
    sums: State = {}
    for state in states:
        for name, tensor in state.items():
            value = tensor.float() if tensor.dtype == torch.float16 else tensor
            if name in sums:
                sums[name] += value
            else:
                sums[name] = value.clone()
    for tensor in sums.values():
        tensor.div_(len(states)) if tensor.is_floating_point() else tensor.floor_divide_(len(states))
    return sums


def plainly(model: nn.Module, state: State) -> None:
    model.load_state_dict(state)


def assigned(model: nn.Module, state: State) -> None:
    model.load_state_dict(state, assign=True)


def adopted(model: nn.Module, state: State) -> None:
    before = dict(state)
    try:
        adopt(state, views_of(model))
    except MismatchError:
        assert all(state[name] is tensor for name, tensor in before.items())
        raise
    model.load_state_dict(state)


LOADERS = pytest.mark.parametrize("load", [plainly, assigned, adopted])


def buffers(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if name.endswith((".codes", ".phase"))}


def same(a: State, b: State) -> bool:
    return all(torch.equal(tensor, b[name]) for name, tensor in buffers(a).items())


@LOADERS
@pytest.mark.parametrize("n", [2, 3, 300])
def test_the_mean_of_dense_checkpoints_loads(load: Callable, n: int) -> None:
    states = [made(0, seed).state_dict() for seed in range(2)]
    model = made(0)
    load(model, mean([states[i % 2] for i in range(n)]))
    expected = torch.stack([states[i % 2]["block.fc1.weight"] for i in range(n)]).mean(0)
    torch.testing.assert_close(model.block.fc1.weight, expected)


@LOADERS
@pytest.mark.parametrize("kind", ["product", "many"])
@pytest.mark.parametrize("phase", [CODED, FROZEN])
@pytest.mark.parametrize("n", [2, 128])
def test_the_mean_of_other_codes_is_refused(load: Callable, n: int, phase: int, kind: str) -> None:
    states = [made(phase, seed, kind).state_dict() for seed in range(2)]
    target = made(0, 5, kind)
    with pytest.raises(MismatchError, match=rf"^(embed|conv|mix|block\.\S*)\.weight: {SAID}$"):
        load(target, mean([states[i % 2] for i in range(n)]))


@LOADERS
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("phases", [(0, FROZEN), (FROZEN, CODED), (CODED, 0), (0, 0, FROZEN)], ids=str)
def test_the_mean_of_two_phases_is_refused(load: Callable, phases: tuple[int, ...], kind: str) -> None:
    if kind == "integer" and CODED in phases:
        return  # integers have no such phase
    states = {phase: made(phase, 0, kind).state_dict() for phase in phases}
    with pytest.raises(MismatchError, match=f"{SAID}$"):
        load(made(0, 5, kind), mean([states[phase] for phase in phases]))


@LOADERS
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("n", [2, 100, 128])
def test_equal_codes_are_taken_where_their_mean_is_right_and_nowhere_else(
    load: Callable, n: int, kind: str
) -> None:
    state = made(FROZEN, 0, kind).state_dict()
    averaged = mean([state] * n)
    right = same(averaged, state)
    assert right == (n < (17 if kind == "product" else 2 if kind == "many" else 128)), "uint8 overflows"
    target = made(0, 5, kind)
    if right:
        load(target, averaged)
        torch.testing.assert_close(target(IDS), made(FROZEN, 0, kind)(IDS))
    else:
        with pytest.raises(MismatchError, match=f"{SAID}$"):
            load(target, averaged)


@cache
def stored(phase: int) -> State:
    return made(phase).state_dict()


@given(st.data())
def test_no_change_of_codes_or_phase_passes(data: st.DataObject) -> None:
    """One code or one phase, changed by hand in any way."""
    state = {
        name: tensor.clone() for name, tensor in stored(data.draw(st.sampled_from([CODED, FROZEN]))).items()
    }
    flat = state[data.draw(st.sampled_from(sorted(buffers(state))))].view(-1)
    i = data.draw(st.integers(0, len(flat) - 1))
    flat[i] = data.draw(st.integers(0, 255).filter(lambda value: value != int(flat[i])))
    with pytest.raises(MismatchError):
        adopted(made(0, 5), state)
    with pytest.raises(MismatchError):
        plainly(made(0, 5), state)


# -- torch's averages, which write into the buffers of a model


@pytest.mark.parametrize("kind", RULES)
def test_a_model_averaged_over_its_stages_is_refused_when_it_is_read(kind: str) -> None:
    model = made(0, 0, kind)
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    average(IDS)
    fairseq_qn.freeze(model)
    average.update_parameters(model)
    for read in (
        lambda: average(IDS),
        lambda: average.module.block.fc1.weight,
        lambda: fairseq_qn.freeze(average.module),
    ):
        with pytest.raises(ViewError, match=SAID):
            read()


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("kind", RULES)
def test_a_model_averaged_within_a_stage_is_right(kind: str, use_buffers: bool) -> None:
    """Codes stay and weights move: the mean has the codes, and the mean of the codebooks."""
    model = made(FROZEN, 0, kind)
    average = AveragedModel(model, use_buffers=use_buffers)
    expected = []
    for step in range(3):
        with torch.no_grad():
            model.block.fc1.get_parameter("weight").mul_(1 + step / 10)
        average.update_parameters(model)
        expected.append(model.block.fc1.weight.detach().clone())
    if kind != "integer":
        torch.testing.assert_close(average.module.block.fc1.weight, torch.stack(expected).mean(0))
    assert same(average.module.state_dict(), model.state_dict())


def test_codes_learned_anew_break_the_average() -> None:
    model = made(CODED)
    average = AveragedModel(model, use_buffers=True)
    average.update_parameters(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    fairseq_qn.refresh(model)
    average.update_parameters(model)
    with pytest.raises(ViewError, match=SAID):
        average.train()(IDS)


# -- other recipes, older checkpoints, damage


OTHERWISE = {
    "K": (dict(k=16), dict(k=8), r"expected block_size, n_centroids \[\d, 8, 0\], found \[\d, 16, 0\]"),
    "bits": (
        dict(scheme="integer"),
        dict(scheme="integer", bits=4),
        r"expected bits, .* \[4, 1, 0\], found \[8, 1, 0\]",
    ),
    "ranges": (
        dict(scheme="integer"),
        dict(scheme="integer", granularity="tensor"),
        r"\[8, 0, 0\], found \[8, 1, 0\]",
    ),
}


@LOADERS
@pytest.mark.parametrize("case", OTHERWISE)
def test_frozen_by_another_recipe_of_the_same_shapes(case: str, load: Callable) -> None:
    """Codes of K 16 that all lie below 8 as well."""
    old, new, words = OTHERWISE[case]
    source = Net().eval()
    with torch.no_grad():
        # few distinct blocks: few codes
        source.block.fc1.weight.copy_(torch.arange(5).repeat(32)[:128].view(16, 8))
    fairseq_qn.apply(source, recipe("block.fc1", **old))
    fairseq_qn.freeze(source)
    if case == "K":
        source.block.fc1.codes.remainder_(8)
        next(iter(views_of(source))).phase = FROZEN  # signs what is there
    target = Net()
    fairseq_qn.apply(target, recipe("block.fc1", **new))
    with pytest.raises(MismatchError, match=rf"^block\.fc1\.weight: .*{words}"):
        load(target, source.state_dict())


@LOADERS
@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("phase", [0, CODED, FROZEN])
def test_checkpoints_of_before_there_were_digests_load(load: Callable, phase: int, kind: str) -> None:
    source = made(phase, 0, kind)
    old = {name: tensor for name, tensor in source.state_dict().items() if not name.endswith(".digest")}
    target = made(0, 5, kind)
    load(target, dict(old))
    assert all(
        torch.equal(tensor, target.state_dict()[name]) for name, tensor in source.state_dict().items()
    )
    if phase == FROZEN:
        assert torch.equal(target(IDS), source(IDS))


def damaged(name: str, value: Any) -> Callable[[State], object]:
    def edit(state: State) -> None:
        if isinstance(value, int):
            state[name].view(-1)[0] = value
        else:
            state[name] = value

    return edit


DAMAGE = {
    "phase 3": damaged("block.fc1.phase", 3),
    "phase 255": damaged("block.fc1.phase", 255),
    "two phases": damaged("block.fc1.phase", torch.tensor([2, 2], dtype=torch.uint8)),
    "phase of floats": damaged("block.fc1.phase", torch.tensor(2.0)),
    "text": damaged("block.fc1.phase", "2"),
    "negative codes": damaged("block.fc1.codes", -1),
    "codes beyond K": damaged("block.fc1.codes", 300),
    "codes of floats": damaged("block.fc1.codes", torch.zeros(64, 8)),
    "no digest of ours": damaged("block.fc1.digest", torch.zeros(3, dtype=torch.int64)),
}


@LOADERS
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_states(kind: str, signed: bool, load: Callable) -> None:
    """As they are, and without the digest, as if they were of before."""
    model = made(FROZEN, 0, "many")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if not signed:
        state = {name: tensor for name, tensor in state.items() if not name.endswith(".digest")}
    DAMAGE[kind](state)
    with pytest.raises(MismatchError, match=r"^block\.fc1\.weight: "):
        load(made(0, 5, "many"), state)


def test_an_average_is_not_loaded_into_a_dense_model_either() -> None:
    """Nor where the phases average to FLOAT, in which nobody would look at the codes."""
    averaged = mean([made(FROZEN).state_dict()] * 128)
    assert int(averaged["block.fc1.phase"]) == 0
    with pytest.raises(MismatchError, match=SAID):
        adopt(averaged, [])
