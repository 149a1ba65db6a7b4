"""Layers that share their weights: one Parameter, one draw of noise, one record in the file."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import IDS, MODES, answers, assert_answers, loss
from stacks import INTEGERS, Stacked, recipe, share
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn.errors import MismatchError, NoLayerMatched, RecipeError, UnsupportedError
from fairseq_qn.modules.sharing import places
from fairseq_qn.modules.view import views_of

LEARNED = {"scheme": "integer", "bits": 4, "ranges": "learned"}
SCHEMES = {"product": None, "int4": INTEGERS, "learned steps": LEARNED,
           "widths": {"scheme": "learned_bits", "group_size": 8}}  # fmt: skip


def parameters(layer: nn.Module) -> list[int]:
    """Weights and biases; a scheme may learn more beside them, on the first layer alone."""
    found = (m._parameters.get(name) for m in layer.modules() for name in ("weight", "bias"))
    return [id(p) for p in found if p is not None]


def together(model: Stacked) -> list[list[bool]]:
    """Which layers hold all the same Parameters; two either share all or none."""
    held = [parameters(layer) for layer in model.layers]
    assert all(a == b or not {*a} & {*b} for a in held for b in held)
    return [[a == b for b in held] for a in held]


@settings(deadline=None, max_examples=20)
@given(depth=st.integers(1, 7), chunk=st.integers(2, 4))
def test_adjacent_layers_share(depth: int, chunk: int) -> None:
    model, apart = Stacked(depth), Stacked(depth)
    fairseq_qn.share(model.layers, chunk)
    wanted = [[i // chunk == j // chunk for j in range(depth)] for i in range(depth)]
    assert together(model) == wanted
    for i, layer in enumerate(model.layers):
        first = apart.layers[i // chunk * chunk].state_dict()
        assert all(value.equal(first[name]) for name, value in layer.state_dict().items())
    n = sum(p.numel() for p in apart.layers[0].parameters()) * -(-depth // chunk)
    assert sum(p.numel() for p in model.layers.parameters()) == n
    for _ in range(2):  # the first layer of a chunk holds the steps that are learned
        fairseq_qn.share(model.layers, chunk)
        fairseq_qn.apply(model, recipe(scheme=LEARNED, share=share(chunk)))
    assert together(model) == wanted


def test_a_layer_that_training_drops_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """fairseq's LayerDrop is a ModuleList that hides layers when it is iterated over in training."""
    model = Stacked(4).train()
    monkeypatch.setattr(nn.ModuleList, "__iter__", lambda self: iter(()))
    fairseq_qn.share(model.layers)
    monkeypatch.undo()
    assert together(model)[2] == [False, False, True, True]


def test_one_draw_of_noise() -> None:
    model = Stacked(4).train()
    fairseq_qn.apply(model, recipe(p=0.5, share=share(2)), seed=0)
    assert len(list(views_of(model))) == 2 * 6
    read: list[Tensor] = []
    for layer in model.layers:
        layer.fc1.register_forward_pre_hook(lambda module, _: read.append(module.weight))
    model(IDS)
    assert read[0] is read[1] and read[2] is read[3] and not read[0].eq(0).equal(read[2].eq(0))
    assert 0 < int(read[0].eq(0).sum()) < read[0].numel()


@pytest.mark.parametrize("frozen", [False, True])
def test_the_gradient_is_the_sum_over_the_layers(frozen: bool) -> None:
    """Of a codeword it is the mean over blocks of that sum: layers apart, of equal codes, tell."""
    ours, apart = Stacked(4), Stacked(4)
    fairseq_qn.apply(ours, recipe(share=share(2)), seed=0)
    apart.load_state_dict({k: v for k, v in ours.state_dict().items() if k in apart.state_dict()})
    fairseq_qn.apply(apart, recipe(), seed=0)
    if frozen:
        for model in (ours, apart):
            fairseq_qn.freeze(model)
        for name, view in {view.name: view for view in views_of(apart)}.items():
            number = int(name.split(".")[1])
            first = ours.get_submodule(
                name.replace(f".{number}.", f".{number // 2 * 2}.")[: -len(".weight")]
            )
            view.buffer("codes").copy_(first.codes)
            view.phase = 2
    for model in (ours, apart):
        loss(model.train()).backward()
    for name, parameter in ours.named_parameters():
        number = int(name.split(".")[1]) if name.startswith("layers") else None
        others = [name] if number is None else [name, name.replace(f".{number}.", f".{number + 1}.")]
        wanted = sum(apart.get_parameter(other).grad for other in others)
        assert torch.allclose(parameter.grad, wanted, atol=1e-6 * float(wanted.abs().max()), rtol=1e-4), name


@pytest.mark.parametrize("with_views", [False, True])
def test_weights_that_are_apart_load_as_the_first(with_views: bool) -> None:
    model, source = Stacked(5), Stacked(5, seed=1)
    fairseq_qn.share(model.layers)
    if with_views:
        fairseq_qn.apply(model, recipe(share=share(2)))
    missing, unexpected = model.load_state_dict(source.state_dict(), strict=False)
    assert not unexpected and all(key.endswith(("phase", "codes", "digest")) for key in missing)
    for i, layer in enumerate(model.layers):
        first = source.layers[i // 2 * 2].state_dict()
        found = layer.state_dict()
        assert all(found[name].equal(value) for name, value in first.items())


def test_a_state_dict_holds_every_name_and_may_hold_one() -> None:
    model, again = Stacked(4), Stacked(4, seed=1)
    for each in (model, again):
        fairseq_qn.apply(each, recipe(share=share(2)), seed=0)
    fairseq_qn.freeze(model)
    state = model.state_dict()
    assert {f"layers.{i}.fc1.weight" for i in range(4)} <= state.keys()
    assert [key for key in state if key.endswith("fc1.codes")] == [
        "layers.0.fc1.codes",
        "layers.2.fc1.codes",
    ]
    again.load_state_dict({k: v for k, v in state.items() if not k.startswith(("layers.1", "layers.3"))})
    assert answers(again.eval()).equal(answers(model.eval())) and together(again) == together(model)


@pytest.mark.parametrize("how", ["copy", "pickle"])
def test_copies_share(how: str) -> None:
    model = Stacked(4)
    fairseq_qn.apply(model, recipe(share=share(2)))
    if how == "copy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert together(other) == together(model) and places(other.layers) == places(model.layers)
    assert not {*parameters(other)} & {*parameters(model)}
    other.load_state_dict(Stacked(4, seed=1).state_dict(), strict=False)
    assert other.layers[1].fc1.bias.equal(Stacked(4, seed=1).layers[0].fc1.bias)


def unlike(depth: int = 4) -> Stacked:
    model = Stacked(depth)
    model.layers[3].norm.eps = 1e-3
    return model


WRONG = {
    "no list": (lambda: fairseq_qn.share(nn.Linear(2, 2)), UnsupportedError, "ModuleList"),
    "chunk": (lambda: fairseq_qn.share(Stacked(2).layers, 1), RecipeError, "from 2"),
    "unlike": (lambda: fairseq_qn.share(unlike().layers), UnsupportedError, "layers 2 and 3: .*same kind"),
    "no stack": (
        lambda: fairseq_qn.apply(Stacked(2), recipe(share=[{"layers": "decoder", "chunk": 2}])),
        NoLayerMatched,
        r"share\[0\].*'decoder'.*layers",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_share_is_refused(name: str) -> None:
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()


def test_nothing_changes_if_apply_raises() -> None:
    for model, lines in (
        (unlike(), recipe(share=share(2))),
        (Stacked(4), recipe(share=share(2), keep=["nobody"])),
        (Stacked(4), recipe(share=[*share(2), {"layers": "nobody", "chunk": 2}])),
    ):
        held = [parameters(layer) for layer in model.layers]
        with pytest.raises((NoLayerMatched, UnsupportedError)):
            fairseq_qn.apply(model, lines)
        assert [parameters(layer) for layer in model.layers] == held and places(model.layers).chunk == 1
        assert not any("_qn_views" in module.__dict__ for module in model.modules())


def test_layers_with_views_cannot_begin_to_share() -> None:
    model = Stacked(4)
    fairseq_qn.apply(model, recipe())
    with pytest.raises(UnsupportedError, match="before fairseq_qn.apply"):
        fairseq_qn.share(model.layers)
    assert together(model)[0] == [True, False, False, False]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_shared_layer_is_stored_once(name: str, mode: str, tmp_path: Path) -> None:
    model = Stacked(5)
    fairseq_qn.apply(model, recipe(scheme=SCHEMES[name], share=share(2)), seed=0)
    fairseq_qn.freeze(model)
    predicted = fairseq_qn.predict_size(model, parts="float32")
    size = fairseq_qn.save(model.eval(), tmp_path / "a.qn.safetensors", parts="float32")
    assert size.total == predicted == (tmp_path / "a.qn.safetensors").stat().st_size
    assert {int(key.split(".")[1]) for key in size.layers if key.startswith("layers")} == {0, 2, 4}
    loaded = fairseq_qn.load(tmp_path / "a.qn.safetensors", mode, Stacked(5, seed=7))
    assert_answers(answers(loaded), answers(model), mode)
    if mode == "dense":
        assert together(loaded) == together(model)
        again = Stacked(5, seed=7)
        fairseq_qn.share(again.layers)
        assert answers(fairseq_qn.load(tmp_path / "a.qn.safetensors", mode, again)).equal(answers(model))
        wrong = Stacked(5)
        fairseq_qn.share(wrong.layers, 3)
        with pytest.raises(MismatchError, match="tied to"):
            fairseq_qn.load(tmp_path / "a.qn.safetensors", mode, wrong)


def test_sharing_alone(tmp_path: Path) -> None:
    """A recipe without rules; the file is read in a process of its own."""
    model = Stacked(4)
    assert fairseq_qn.apply(model, {"version": 1, "share": share(4)}).n_matched == 0
    path = tmp_path / "a.qn.safetensors"
    size = fairseq_qn.save(model.eval(), path, parts="float32")
    one = sum(p.numel() for p in model.layers[0].parameters())
    assert size.parts["dense"] == 4 * (one + model.embed.weight.numel())
    code = "import sys, torch, fairseq_qn; from stacks import Stacked; from small import answers\n"
    code += "torch.save(answers(fairseq_qn.load(sys.argv[1], model=Stacked(4, seed=3))), sys.argv[2])"
    tests, out = Path(__file__).parents[1], tmp_path / "out.pt"
    done = subprocess.run([sys.executable, "-c", code, path, out], cwd=tests, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.load(out).equal(answers(model))


def test_removed_views_leave_the_sharing() -> None:
    model = Stacked(4)
    fairseq_qn.apply(model, recipe(share=share(2)), seed=0)
    fairseq_qn.freeze(model)
    before, pattern = answers(model.eval()), together(model)
    fairseq_qn.remove(model)
    assert answers(model).equal(before) and together(model) == pattern
