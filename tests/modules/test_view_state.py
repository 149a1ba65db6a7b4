"""What a view leaves alone: names, Parameters, state dicts in every phase, copies, conversions; and apply
when it fails.
"""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from small import IDS, LAYERS, Net, loss, recipe
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn.errors import BlockSizeError, NoLayerMatched, QNError, RecipeError, UnsupportedError
from fairseq_qn.modules.view import FROZEN, views_of
from fairseq_qn.quant.product import codebook_of


def in_phase(phase: str, **more: Any) -> Net:
    """A model in one of the phases, ready to train."""
    model = Net().train()
    fairseq_qn.apply(model, recipe(kind="exact" if phase == "coded" else "proxy", p=0.5, **more))
    if phase == "coded":
        fairseq_qn.refresh(model)
    if phase == "frozen":
        fairseq_qn.freeze(model)
    return model


PHASES = ["float", "coded", "frozen"]


def run(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Scores and gradients of update 5."""
    fairseq_qn.set_update(model, 5, 1)
    model.zero_grad()
    loss(model).backward()
    return model(IDS).detach(), [p.grad for p in model.parameters()]


def assert_same(a: tuple[Tensor, list[Tensor]], b: tuple[Tensor, list[Tensor]]) -> None:
    assert torch.equal(a[0], b[0]) and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


def test_apply_touches_no_parameter_and_adds_three_buffers_a_layer() -> None:
    model = Net()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    fairseq_qn.apply(model, recipe())
    assert {name: id(p) for name, p in model.named_parameters()} == {
        name: id(p) for name, p in parameters.items()
    }
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())
    added = set(model.state_dict()) - set(keys)
    assert added == {f"{name}.{buffer}" for name in LAYERS for buffer in ("phase", "codes", "digest")}
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in Net().modules()]
    assert isinstance(model.embed, nn.Embedding) and isinstance(model.block.fc1, nn.Linear)
    integers = Net()
    fairseq_qn.apply(integers, recipe(scheme="integer"))
    assert set(integers.state_dict()) - set(keys) == {
        f"{name}.{buffer}" for name in LAYERS for buffer in ("phase", "digest")
    }


def test_keys_shapes_and_dtypes_of_the_state_dict_are_the_same_in_every_phase() -> None:
    first, *others = [
        {n: (t.shape, t.dtype) for n, t in in_phase(phase).state_dict().items()} for phase in PHASES
    ]
    assert all(first == other for other in others)


@pytest.mark.parametrize("before", PHASES)
@pytest.mark.parametrize("after", PHASES)
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict_between_phases(before: str, after: str, assign: bool) -> None:
    source, target = in_phase(after), in_phase(before)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(0.01)
    run(target)  # so that it has caches to forget
    target.eval()  # assign=True reads the weights that it replaces, halfway
    target.load_state_dict({n: t.clone() for n, t in source.state_dict().items()}, assign=assign)
    assert [v.phase for v in views_of(target)] == [v.phase for v in views_of(source)]
    if after == "frozen" or before == after:
        torch.testing.assert_close(target.eval()(IDS), source.eval()(IDS), rtol=0, atol=0)
    if before == after and not assign:
        assert_same(run(target.train()), run(source.train()))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_equal_and_apart(phase: str, how: str) -> None:
    model = in_phase(phase)
    expected = run(model)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert twin.embed.get_parameter("weight") is twin.head.get_parameter("weight")
    assert_same(run(twin), expected)
    mine, other = ({id(t) for t in [*m.parameters(), *m.buffers()]} for m in (model, twin))
    homes = [{id(view.home) for view in views_of(m)} for m in (model, twin)]
    assert not mine & other and not homes[0] & homes[1]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    fairseq_qn.freeze(twin)
    fairseq_qn.set_update(twin, 77)
    assert_same(run(model), expected)


def test_a_copy_has_a_clock_of_its_own() -> None:
    model = in_phase("float")
    model(IDS)
    twin = copy.deepcopy(model)
    weight = twin.block.fc1.weight.detach()
    model(IDS)
    assert torch.equal(twin.block.fc1.weight, weight)
    twin(IDS)
    assert torch.equal(twin.block.fc1.weight, model.block.fc1.weight) and not torch.equal(
        twin.block.fc1.weight, weight
    )


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversions(phase: str, dtype: torch.dtype) -> None:
    model = in_phase(phase)
    run(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    plain = {name: model.get_submodule(name).weight.detach() for name in LAYERS}
    model.to(dtype)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]) and buffer.dtype == buffers[name].dtype
    for name in LAYERS:
        weight = model.get_submodule(name).weight
        assert weight.dtype == dtype
        torch.testing.assert_close(weight.float(), plain[name], rtol=1e-2, atol=1e-2)
    if dtype == torch.float64:
        view = next(views_of(in_phase("frozen")))
        groups = view.scheme.groups(view)
        assert codebook_of(model.embed.get_parameter("weight"), groups, 4).dtype == dtype
    scores, gradients = run(model)
    assert scores.dtype == dtype and all(g.dtype == dtype for g in gradients)
    assert model.embed.get_parameter("weight") is model.head.get_parameter("weight")
    assert torch.equal(model.to("cpu").half().float().block.fc1.weight, model.float().block.fc1.weight)


def test_optimiser_state_survives_freezing() -> None:
    model = in_phase("float")
    optimizer = torch.optim.Adam(model.parameters())
    loss(model).backward()
    optimizer.step()
    kept = {id(p): optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    fairseq_qn.freeze(model)
    assert all(torch.equal(optimizer.state[p]["exp_avg"], kept[id(p)]) for p in model.parameters())
    loss(model).backward()
    optimizer.step()


# -- apply


class Occupied(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.codes = "mine"


def rules(*entries: dict[str, Any]) -> dict[str, Any]:
    product = {"scheme": "product", "block_size": 4}
    return {
        "version": 1,
        "rules": [entry if "scheme" in entry else {**product, **entry} for entry in entries],
    }


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (rules({"layers": "[01]"}, {"layers": "2", "block_size": 3}), BlockSizeError),
        (
            rules(
                {"layers": "[01]"},
                {"layers": "2", "scheme": "integer", "granularity": "group", "group_size": 3},
            ),
            BlockSizeError,
        ),
        (rules({"layers": "[01]"}, {"layers": "nothing"}), NoLayerMatched),
        (rules({"layers": "[0-3]"}), UnsupportedError),
        (rules({"layers": "["}), RecipeError),
        ({"version": 3}, RecipeError),
    ],
)
def test_apply_that_fails_leaves_the_model_as_it_was(data: dict[str, Any], error: type[QNError]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(9, 4), nn.Linear(4, 8), Occupied())
    keys, kinds, attributes = list(model.state_dict()), [type(m) for m in model.modules()], set(vars(model))
    with pytest.raises(error):
        fairseq_qn.apply(model, data)
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == kinds
    assert set(vars(model)) == attributes and not model._forward_pre_hooks and not list(views_of(model))
    fairseq_qn.apply(model, rules({"layers": "[012]"}))


def test_apply_again_covers_what_was_added_and_leaves_the_rest() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    data = rules({"layers": r"\d"})
    fairseq_qn.apply(model, data)
    fairseq_qn.freeze(model)
    codes, hooks = model[0].codes.clone(), len(model._forward_pre_hooks)
    model.append(nn.Linear(8, 8))
    coverage = fairseq_qn.apply(model, data)
    assert list(coverage.matched) == ["0.weight", "1.weight"] and len(model._forward_pre_hooks) == hooks
    assert [view.phase == FROZEN for view in views_of(model)] == [True, False]
    assert torch.equal(model[0].codes, codes)
    assert len({id(view.clock) for view in views_of(model)}) == 1
    with pytest.raises(
        UnsupportedError, match="^apply: the model, a part of it .* carries the views of another recipe"
    ):
        fairseq_qn.apply(model, rules({"layers": "0"}))


def nested() -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 8))


@pytest.mark.parametrize("first", ["part", "whole", "whole, which leaves the part alone"])
def test_apply_to_a_part_and_its_whole_with_other_recipes(first: str) -> None:
    model = nested()
    one, other = (
        rules({"layers": "2" if "alone" in first else ".*"}),
        rules({"layers": ".*", "block_size": 2}),
    )
    targets = [model[0], model] if first == "part" else [model, model[0]]
    fairseq_qn.apply(targets[0], one)
    keys, kinds = list(model.state_dict()), [type(m) for m in model.modules()]
    with pytest.raises(
        UnsupportedError, match="^apply: .* carries the views of another recipe; build it anew"
    ):
        fairseq_qn.apply(targets[1], other)
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == kinds


def test_apply_to_parts_and_then_their_whole_with_one_recipe() -> None:
    """One clock, and names that tell the parts' layers apart; a file of the whole or of a part is right."""
    model, data = nested(), rules({"layers": ".*"}) | {"noise": {"kind": "proxy", "p": 0.5}}
    for part in (model[0], model[1]):
        fairseq_qn.apply(part, data)
    fairseq_qn.apply(model, data)
    views = list(views_of(model))
    assert [view.name for view in views] == ["0.0.weight", "1.0.weight", "2.weight"]
    assert len({id(view.clock) for view in views}) == 1
    model.train()(torch.zeros(1, 8))
    assert views[0].clock.update == 1
    masks = [view.home.weight.eq(0) for view in views]
    assert not torch.equal(masks[0], masks[1])
    fairseq_qn.apply(model[0], data)
    assert [view.name for view in views_of(model)] == ["0.0.weight", "1.0.weight", "2.weight"]


@pytest.mark.parametrize("last", ["part", "whole"])
def test_files_of_a_part_and_of_its_whole(last: str, tmp_path: Path) -> None:
    model, data = nested().eval(), rules({"layers": ".*"})
    for target in [model, model[0]] if last == "part" else [model[0], model]:
        fairseq_qn.apply(target, data)
    fairseq_qn.freeze(model)
    x = torch.ones(1, 8)
    for target, fresh in ((model, nested()), (model[0], nested()[0])):
        if target is model[0] and last == "whole" or target is model and last == "part":
            fairseq_qn.apply(target, data)
        fairseq_qn.save(target, tmp_path / "f.qn.safetensors", parts="float32")
        found = fairseq_qn.load(tmp_path / "f.qn.safetensors", model=fresh)
        torch.testing.assert_close(found(x), target(x))


@pytest.mark.parametrize("name", ["after", "a_first"])
def test_an_owner_that_came_later_reads_the_view_that_is_there(name: str) -> None:
    """Whichever of the two owners the recipe's pattern meets first."""
    model = nn.Module()
    model.embed = nn.Embedding(20, 8)
    fairseq_qn.apply(model, rules({"layers": ".*"}))
    fairseq_qn.freeze(model)
    seen, codes = model.embed.weight.detach(), model.embed.codes.clone()
    head = nn.Linear(8, 20, bias=False)
    head.weight = model.embed.get_parameter("weight")
    model._modules = {name: head, **model._modules} if name < "embed" else {**model._modules, name: head}
    fairseq_qn.apply(model, rules({"layers": ".*"}))
    assert torch.equal(head.weight, seen) and torch.equal(model.embed.weight, seen)
    assert (
        len(list(views_of(model))) == 1
        and torch.equal(model.embed.codes, codes)
        and not hasattr(head, "codes")
    )


def test_a_module_under_two_names_has_one_view() -> None:
    model = nn.Module()
    model.a = nn.Linear(8, 8)
    model.b = model.a
    fairseq_qn.apply(model, rules({"layers": "b"}))
    assert len(list(views_of(model))) == 1 and set(model.state_dict()) >= {"a.codes", "b.codes"}


def test_a_plain_checkpoint_loads_with_strict_off() -> None:
    model = in_phase("float")
    with pytest.raises(RuntimeError, match="embed.phase"):
        model.load_state_dict(Net().state_dict())
    missing = model.load_state_dict(Net(3).state_dict(), strict=False)
    assert not missing.unexpected_keys and all(
        key.endswith(("phase", "codes", "digest")) for key in missing.missing_keys
    )
    assert torch.equal(model.eval()(IDS), Net(3).eval()(IDS))
