"""What holds for each of SCHEMES, and for one that the package does not know: from the recipe to the answer
of a packed model.
"""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import IDS, LAYERS, MODES, Net, loss
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn.artifact.streams import CODERS
from fairseq_qn.errors import FormatError, MismatchError, NonFiniteWeight, RecipeError, UnsupportedError
from fairseq_qn.modules.packed import Packed
from fairseq_qn.modules.view import CODED, FLOAT, FROZEN, views_of
from fairseq_qn.recipe import Recipe
from fairseq_qn.schemes import SCHEMES
from fairseq_qn.schemes.base import Scheme

NAMES = ["product", "integer", "learned_bits", "kernel", "toy"]  # checked to be all of them
LINES: dict[str, dict[str, Any]] = {
    "product": {"block_size": 2, "n_centroids": 5}, "integer": {"bits": 4}, "toy": {},
    "int8 codebook": {"scheme": "product", "block_size": 2, "n_centroids": 5, "codebook_bits": 8},
    "signs": {"scheme": "integer", "bits": 1}, "ternary": {"scheme": "integer", "bits": "ternary"},
    "symmetric": {"scheme": "integer", "bits": 8, "symmetric": True, "granularity": "tensor"},
    "percentile": {"scheme": "integer", "bits": 4, "ranges": "percentile", "granularity": "tensor"},
    "histogram": {"scheme": "integer", "bits": 3, "ranges": "histogram"},
    "learned": {"scheme": "integer", "bits": 4, "ranges": "learned"},
    "learned_bits": {"granularity": "channel"}, "kernel": {"n_centroids": 5},
    "kernel signs": {"scheme": "kernel", "n_centroids": 7, "codebook_bits": 1},
    "whole": {"scheme": "learned_bits", "granularity": "tensor", "max_bits": 8, "pseudo_noise": "uniform"},
}  # fmt: skip
STAGES = {"embed": "emb"}
each_scheme = pytest.mark.parametrize("name", LINES)


def recipe(name: str, kind: str = "none", p: float = 0.0) -> dict[str, Any]:
    """All layers of the net by one scheme, in two stages."""
    rules = []
    for layer in LAYERS:
        own = LINES[name] | ({"block_size": LAYERS[layer]} if "block_size" in LINES[name] else {})
        stage = STAGES.get(layer, "rest")
        rules.append({"layers": layer.replace(".", r"\."), "scheme": name, "stage": stage} | own)
    noise = {"kind": kind, "p": p} if kind != "none" else {"kind": kind}
    return {"version": 1, "noise": noise, "rules": rules, "stages": ["emb", "rest"]}


def scheme_of(name: str) -> type[Scheme]:
    return SCHEMES[LINES[name].get("scheme", name)]


def made(name: str, kind: str = "none", p: float = 0.0, seed: int = 0) -> Net:
    model = Net(seed)
    fairseq_qn.apply(model, recipe(name, kind, p), seed=5)
    return model.train()


def frozen(name: str, seed: int = 0) -> Net:
    model = made(name, seed=seed)
    fairseq_qn.freeze(model)
    return model


def test_they_are_all_here() -> None:
    assert NAMES == list(SCHEMES)
    for name, scheme in SCHEMES.items():
        assert (
            scheme.name == name and len({f.name for f in fields(scheme)} & {"layers", "stage", "noise"}) == 0
        )


@each_scheme
def test_its_lines_of_a_recipe(name: str) -> None:
    loaded = Recipe.load(recipe(name))
    assert all(type(rule.scheme) is scheme_of(name) for rule in loaded.rules)
    assert Recipe.load(loaded.to_json()) == loaded and hash(loaded.rules[0].scheme) == hash(
        loaded.rules[0].scheme
    )
    for other in set(NAMES) - {scheme_of(name).name}:
        for field in fields(SCHEMES[other]):
            if field.name in {own.name for own in fields(scheme_of(name))}:
                continue
            data = recipe(name)
            data["rules"][0][field.name] = 4
            with pytest.raises(
                RecipeError, match=rf"rules\[0\]: {field.name}: not of scheme {scheme_of(name).name};"
            ):
                Recipe.load(data)
    for field in fields(scheme_of(name)):
        for value in (None, -1, 0, 10**9, 2.5, "x", [], {}, True):
            data = recipe(name)
            if value is True and type(field.default) is bool:
                continue
            data["rules"][0][field.name] = value
            with pytest.raises(RecipeError, match=rf"^recipe: rules\[0\]\.{field.name}: expected "):
                Recipe.load(data)


@each_scheme
@pytest.mark.parametrize("kind", ["proxy", "exact"])
def test_it_trains_with_noise(name: str, kind: str) -> None:
    model = made(name, kind, 0.5)
    fairseq_qn.refresh(model)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    fairseq_qn.follow(model, optimizer)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    losses = []
    for _ in range(20):
        losses.append(float(loss(model).detach()))
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    for key, p in model.named_parameters():
        learned = key.rpartition(".")[2] in scheme_of(name).parameter_names
        moved = not learned or kind == "exact" or name != "toy"  # whose proxy is 0 whatever is learned
        assert torch.equal(p, before[key]) is not moved, key
    assert sum(losses[-5:]) < sum(losses[:5])
    fairseq_qn.set_update(model, 3)
    first, again = model.block.fc1.weight.detach(), model.block.fc1.weight.detach()
    fairseq_qn.set_update(model, 4)
    other = model.block.fc1.weight.detach()
    assert torch.equal(first, again) and not torch.equal(first, other)
    model.eval()
    plain = model.block.fc1.weight is model.block.fc1.get_parameter("weight")
    assert plain is not scheme_of(name).rounds_in_evaluation


@each_scheme
def test_certain_noise_reads_what_is_frozen(name: str) -> None:
    model = made(name, "exact", 1.0)
    fairseq_qn.refresh(model)
    fairseq_qn.set_update(model, 1)
    noised = {view.name: view.read(view.weight, True).detach().clone() for view in views_of(model)}
    for view in views_of(model):
        assert view.phase == (CODED if view.needs_learning else FLOAT)
        if not scheme_of(name).rounds_in_evaluation:  # whose noise is not what is frozen
            torch.testing.assert_close(noised[view.name], view.quantized())
        view.phase = FROZEN
        torch.testing.assert_close(view.read(view.weight, True).detach(), view.quantized())


@each_scheme
def test_exact_noise_reads_a_weight_or_what_is_frozen(name: str) -> None:
    if scheme_of(name).rounds_in_evaluation:  # its noise is a noise of its own
        return
    model = made(name, "exact", 0.5)
    fairseq_qn.refresh(model)
    fairseq_qn.set_update(model, 1)
    for view in views_of(model):
        seen, phi = view.read(view.weight, True).detach(), view.quantized()
        assert torch.equal(torch.where(seen == view.weight, seen, phi), seen)
        assert 0 < int((seen == phi).sum())


@each_scheme
def test_stages_freeze_in_a_plain_loop_and_resume_to_the_bit(name: str) -> None:
    def build() -> tuple[Net, torch.optim.Optimizer]:
        model = made(name, "proxy", 0.2)
        return model, torch.optim.Adam(model.parameters(), 1e-2)

    def train(model: Net, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        fairseq_qn.Stages(model, optimizer, updates=[2, 4], update=first)
        for _ in range(first, last):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()

    whole, optimizer = build()
    train(whole, optimizer, 0, 6)
    assert all(view.phase == FROZEN for view in views_of(whole))
    part, optimizer = build()
    train(part, optimizer, 0, 3)
    assert {view.rule.stage for view in views_of(part) if view.phase == FROZEN} == {"emb"}
    state = copy.deepcopy((part.state_dict(), optimizer.state_dict()))
    resumed, optimizer = build()
    resumed.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    train(resumed, optimizer, 3, 6)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


@each_scheme
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("parts", ["float16", "float32"])
def test_the_file_answers_as_the_frozen_model(name: str, mode: str, parts: str, tmp_path: Path) -> None:
    model = frozen(name).eval()
    predicted = fairseq_qn.predict_size(model, parts=parts)
    report = fairseq_qn.save(model, tmp_path / "m", parts=parts)
    assert predicted == report.total == (tmp_path / "m").stat().st_size
    loaded = fairseq_qn.load(tmp_path / "m", mode, Net(seed=1))
    tolerance = 1e-5 if parts == "float32" else 2e-2
    torch.testing.assert_close(loaded(IDS), model(IDS), rtol=tolerance, atol=tolerance)
    packed = [module for module in loaded.modules() if isinstance(module, Packed)]
    assert len(packed) == (len(LAYERS) if mode == "packed" else 0)
    shown = fairseq_qn.inspect(tmp_path / "m")
    assert {entry["scheme"] for entry in shown["layers"].values()} == {scheme_of(name).name}
    for module in packed:
        label = scheme_of(name).label(shown["layers"][next(k for k, m in keys(loaded) if m is module)])
        assert label in repr(module)
        ids = torch.tensor([[0, 2], [1, 1]])
        if isinstance(module, nn.Embedding):
            torch.testing.assert_close(module(ids), module.decoded()[ids])


def keys(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(f"{name}.weight", module) for name, module in model.named_modules()]


@each_scheme
def test_a_size_is_asked_of_an_unfrozen_model_and_changes_nothing(name: str) -> None:
    model = made(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    first = fairseq_qn.predict_size(model)
    assert first == fairseq_qn.predict_size(model) and all(v.phase == FLOAT for v in views_of(model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    fairseq_qn.freeze(model)
    assert abs(fairseq_qn.predict_size(model) - first) < 32


@each_scheme
def test_save_refuses_before_it_packs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("packed")

    monkeypatch.setattr(scheme_of(name), "encode", never)
    (tmp_path / "m").write_bytes(b"before")
    with pytest.raises(UnsupportedError, match="stages .* are not frozen yet"):
        fairseq_qn.save(made(name), tmp_path / "m")
    model = frozen(name)
    for value in (float("nan"), float("inf"), -float("inf")):
        with torch.no_grad():
            model.get_parameter("block.fc2.weight")[0, 0] = value
        with pytest.raises(NonFiniteWeight, match=r"^block\.fc2\.weight: frozen with NaN or Inf"):
            fairseq_qn.save(model, tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == b"before"


@each_scheme
def test_the_wrong_codes_are_refused(name: str) -> None:
    model, state = made(name), frozen(name).state_dict()
    key = next(iter(next(views_of(model)).codes), None)
    if key is None:
        return
    state[f"block.fc1.{key}"] = state[f"block.fc1.{key}"] + 2**31 - 100
    with pytest.raises(MismatchError, match=r"^block\.fc1\.weight: "):
        model.load_state_dict(state)


@each_scheme
def test_decoded_weights_load_into_a_plain_model(name: str) -> None:
    model = frozen(name).eval()
    plain = Net(seed=1).eval()
    plain.load_state_dict(fairseq_qn.decoded_state_dict(model))
    torch.testing.assert_close(plain(IDS), model(IDS))


VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=2)
)


@each_scheme
@given(data=st.data())
def test_a_forged_entry_is_a_sentence_not_a_crash(name: str, data: st.DataObject) -> None:
    scheme = scheme_of(name)
    view = next(view for view in views_of(frozen(name)) if view.name == "block.fc1.weight")
    entry = view.scheme.entry(view.weight.detach(), view, torch.float16, True)
    assert scheme.check_entry(entry) is None
    key = data.draw(st.sampled_from(sorted(entry.keys() - {"scheme", "shape"})))
    entry[key] = data.draw(VALUES)
    if data.draw(st.booleans()):
        del entry[key]
    problem = scheme.check_entry(entry)
    assert problem is None or (isinstance(problem, str) and "\n" not in problem)
    if problem is None:
        assert scheme.layout(entry, "float16") and scheme.label(entry)


def entries_are_new(entries: Iterable[dict[str, Any]]) -> bool:
    """Whether a reader of version 2 would not understand them."""
    return any({"symmetric", "min_bits", "scale"} & entry.keys() for entry in entries)


class Zip:
    """A coder whose sizes nobody knows beforehand."""

    def encode(self, raw: Tensor, bits: int) -> Tensor:
        return torch.frombuffer(bytearray(zlib.compress(raw.numpy().tobytes(), 9)), dtype=torch.uint8)

    def decode(self, coded: Tensor, size: int, bits: int) -> Tensor:
        try:
            raw = zlib.decompressobj().decompress(coded.numpy().tobytes(), size)
        except zlib.error as error:
            raise FormatError(f"cannot be unpacked: {error}") from None
        return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


@each_scheme
@pytest.mark.parametrize("mode", MODES)
def test_streams_of_a_size_of_their_own(name: str, mode: str, tmp_path: Path) -> None:
    """With a coder, the same weights in fewer bytes; without it, refused by name."""
    model = frozen(name).eval()
    with torch.no_grad():
        for view in views_of(model):  # easy to compress
            for buffer in map(view.buffer, view.codes):
                buffer.mul_(buffer.dtype != torch.uint8)  # codes, not ranges
            view.weight.copy_(torch.ones(()).expand(view.shape) * 0.1)
            view.phase = FROZEN
    plain = fairseq_qn.save(model, tmp_path / "plain")
    CODERS["zip"] = Zip()
    try:
        coded = fairseq_qn.save(model, tmp_path / "coded", coder="zip")
        entries = fairseq_qn.inspect(tmp_path / "coded")["layers"].values()
        assert any(entry.get("streams") for entry in entries) and coded.parts["codes"] < plain.parts["codes"]
        versions = [fairseq_qn.inspect(tmp_path / name)["version"] for name in ("plain", "coded")]
        old = 3 if entries_are_new(entries) else 2
        assert versions == [old, 3], "a reader that knows no streams has to refuse them"
        json.dumps([*entries])
        found = fairseq_qn.load(tmp_path / "coded", mode, Net(1))(IDS)
        assert torch.equal(found, fairseq_qn.load(tmp_path / "plain", mode, Net(2))(IDS))
    finally:
        del CODERS["zip"]
    with pytest.raises(FormatError, match=r"streams\.\w+\.coder: expected one of \['ans'\], found 'zip'"):
        fairseq_qn.load(tmp_path / "coded", mode, Net(1))
