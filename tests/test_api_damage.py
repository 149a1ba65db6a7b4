"""Damaged, forged and foreign files, as `load` and `inspect` meet them: a named error in one line, and an untouched model.

Forged files have the right digests, so that only the claim itself can give them away.
"""

from __future__ import annotations

import copy
import pickle
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Net, recipe
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn.artifact import bitpack, container
from fairseq_qn.errors import FormatError, MismatchError, QNError, UnsupportedError

Tensors = dict[str, Tensor]
Plan = dict[str, Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with product and integer layers, K = 200, a tie, a dropped module and a file that travels along."""
    model = Net()
    model.extra = nn.Linear(3, 3)
    data = recipe("embed", "conv", "mix", k=200, block_size=1)
    for name in (r"block\.fc1", r"block\.fc2"):
        data["rules"].append({"layers": name, "scheme": "integer", "bits": 3, "granularity": "group", "group_size": 8})
    fairseq_qn.apply(model, data)
    fairseq_qn.freeze(model)
    path = tmp_path_factory.mktemp("saved") / "m.qn.safetensors"
    fairseq_qn.save(model, path, drop=["extra"], assets={"words.txt": b"words " * 100}, source={"config": {"d": [8]}})
    plan = fairseq_qn.inspect(path)
    assert plan["layers"]["conv.weight"]["n_centroids"] == 108 and plan["layers"]["embed.weight"]["n_centroids"] == 152
    return path


def fresh() -> Net:
    model = Net(seed=4)
    model.extra = nn.Linear(3, 3)
    return model


def parts(path: Path) -> tuple[Tensors, Plan]:
    tensors, plan = container.read(path)
    return tensors, {key: value for key, value in plan.items() if key != "tensors"}


def refusal(path: Path, expected: type[QNError] = FormatError, model: nn.Module | None = None) -> str:
    """The message with which both modes of load refuse a file, without touching the model."""
    model = fresh() if model is None else model
    before, modules = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    for mode in ("dense", "packed"):
        with pytest.raises(expected) as error:
            fairseq_qn.load(path, mode, model)
        message = str(error.value)
        assert "\n" not in message and len(message) < 700
        assert [type(m) for m in model.modules()] == modules
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if expected is FormatError:
        assert str(path) in message
    return message


def forge(saved: Path, target: Path, edit: Callable[[Tensors, Plan], object]) -> Path:
    tensors, plan = parts(saved)
    edit(tensors, plan)
    container.write(target, tensors, plan)
    return target


def test_the_forger_can_write_a_good_file(saved: Path, tmp_path: Path) -> None:
    loaded = fairseq_qn.load(forge(saved, tmp_path / "f", lambda t, p: None), model=fresh())
    assert torch.equal(loaded.block.fc1.weight, fairseq_qn.load(saved, model=fresh()).block.fc1.weight)


def test_truncated_and_flipped(saved: Path, tmp_path: Path) -> None:
    whole, path = saved.read_bytes(), tmp_path / "f"
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        refusal(path)
    for position in range(0, len(whole), 61):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 16]) + whole[position + 1 :])
        refusal(path)


class Bomb:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.trace), "w")


def test_pickles_run_no_code(tmp_path: Path) -> None:
    path, trace = tmp_path / "m.qn.safetensors", tmp_path / "it-ran"
    path.write_bytes(pickle.dumps(Bomb(trace)))
    refusal(path)
    torch.save({"model": Bomb(trace)}, path)
    assert "pickle" in refusal(path)
    with pytest.raises(FormatError, match="pickle"):
        fairseq_qn.inspect(path)
    assert not trace.exists()


@pytest.mark.parametrize("version", [0, 2, "1", None, True, 1.5, [1]])
def test_unknown_versions(version: Any, saved: Path, tmp_path: Path) -> None:
    message = refusal(forge(saved, tmp_path / "f", lambda t, p: p.update(version=version)))
    assert f"format version: expected 1, found {version!r}; read it with the release" in message


def test_missing_tensors(saved: Path, tmp_path: Path) -> None:
    tensors, plan = parts(saved)
    layers = {f"{name}/{part}" for name in plan["layers"] for part in ("codes", "codebook", "levels", "scale", "zero")}
    for name in tensors:
        path = forge(saved, tmp_path / "f", lambda t, p, name=name: t.pop(name))
        if name.startswith("asset:"):
            fairseq_qn.load(path, model=fresh())  # a model that is passed in needs no files,
            with pytest.raises(FormatError, match="asset 'words.txt': no such tensor"):
                _ = fairseq_qn.api.read(path).assets  # whoever needs them is told
        elif name in layers:
            assert f"layer {name.split('/')[0]!r}: {name.split('/')[1]}: expected" in refusal(path)
        else:
            assert f"{name}: the model has it, the file has not" in refusal(path, MismatchError)


def test_extra_tensors(saved: Path, tmp_path: Path) -> None:
    for name in ("more", "block.fc1.weight/more", "embed.weight/levels"):
        path = forge(saved, tmp_path / "f", lambda t, p, name=name: t.update({name: torch.zeros(2)}))
        assert f"{name}: the file has it, the model has not" in refusal(path, MismatchError)
    path = forge(saved, tmp_path / "f", lambda t, p: t.update({"conv.weight": torch.zeros(12, 1, 3, 3)}))
    assert "'conv.weight': stored dense and quantised" in refusal(path)
    path = forge(saved, tmp_path / "f", lambda t, p: t.update({"head.weight": torch.zeros(20, 8)}))
    assert "ties: expected names of one weight, stored under the first" in refusal(path)


def test_wrong_shapes_and_dtypes(saved: Path, tmp_path: Path) -> None:
    for name, tensor in parts(saved)[0].items():
        for wrong in (tensor[:-1], torch.cat([tensor, tensor]), tensor.reshape(1, *tensor.shape)):
            path = forge(saved, tmp_path / "f", lambda t, p, n=name, w=wrong: t.update({n: w}))
            if name.startswith("asset:"):
                continue
            message = refusal(path, FormatError if "/" in name else MismatchError)
            assert "expected" in message and "found" in message and name.split("/")[0] in message
        if "/" in name:
            wrong = tensor.to(torch.int16 if tensor.dtype == torch.uint8 else torch.float64)
            assert "expected" in refusal(forge(saved, tmp_path / "f", lambda t, p, n=name, w=wrong: t.update({n: w})))


@pytest.mark.parametrize("code", [152, 200, 255])
def test_codes_beyond_the_codebook(code: int, saved: Path, tmp_path: Path) -> None:
    def edit(tensors: Tensors, plan: Plan) -> None:
        tensors["embed.weight/codes"][70] = code

    assert f"embed.weight: expected codes below 152, found {code}" in refusal(forge(saved, tmp_path / "f", edit))


def test_bits_after_the_last_code(saved: Path, tmp_path: Path) -> None:
    def edit(tensors: Tensors, plan: Plan) -> None:
        tensors["conv.weight/codes"][-1] |= 128  # 108 codes of 7 bits are 756 bits, and four are left over

    assert "conv.weight: packed codes: expected zero bits" in refusal(forge(saved, tmp_path / "f", edit))


def test_a_manifest_that_claims_10_to_the_12_elements(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = [
        *(
            {"shape": shape}
            for shape in ([10**12, 8], [10**6, 10**6], [2, 10**12], [10**19, 2], [20, 8, 10**12], [10**300, 8])
        ),
        *({"n_centroids": n} for n in (10**12, 65_537, 0, -1)),
        *({"block_size": d} for d in (10**12, 4097, 0, -1, 3)),
    ]
    for layer in ("embed.weight", "block.fc1.weight"):
        for claim in claims:
            if layer == "block.fc1.weight" and "shape" not in claim:
                continue
            path = forge(saved, tmp_path / "f", lambda t, p, c=claim, n=layer: p["layers"][n].update(c))
            with monkeypatch.context() as patch:
                patch.setattr(bitpack, "unpack", lambda *_: pytest.fail("unpacked"))
                assert f"layer {layer!r}: " in refusal(path)
                with pytest.raises(FormatError):
                    fairseq_qn.inspect(path)


def test_a_small_file_cannot_claim_a_large_weight(saved: Path, tmp_path: Path) -> None:
    """Consistent with its tensors: one byte of codes for 8 blocks, each as long as the codebook's rows."""

    def edit(tensors: Tensors, plan: Plan) -> None:
        d = 1 << 20
        plan["layers"]["embed.weight"].update(shape=[8 * 1000, d], block_size=d, n_centroids=1, padding_idx=None)
        tensors["embed.weight/codes"] = torch.zeros(1000, dtype=torch.uint8)
        tensors["embed.weight/codebook"] = torch.zeros(1, d, dtype=torch.float16)

    assert "a field is missing or out of range" in refusal(forge(saved, tmp_path / "f", edit))


def test_files_inside_that_are_not_what_they_say(saved: Path, tmp_path: Path) -> None:
    def assets(edit: Callable[[Tensors, Plan], object]) -> str:
        with pytest.raises(FormatError) as error:
            _ = fairseq_qn.api.read(forge(saved, tmp_path / "f", edit)).assets
        assert "\n" not in str(error.value) and "asset 'words.txt'" in str(error.value)
        return str(error.value)

    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(1 << 26), 9)), dtype=torch.uint8)
    assert "expected 600 bytes, found 601+" in assets(lambda t, p: t.update({"asset:words.txt": bomb}))
    assert "expected 601 bytes, found 600" in assets(lambda t, p: p["assets"]["words.txt"].update(bytes=601))
    assert "expected 599 bytes, found 600+" in assets(lambda t, p: p["assets"]["words.txt"].update(bytes=599))
    assert "cannot be unpacked" in assets(lambda t, p: t["asset:words.txt"].zero_())
    for size in (10**12, -1, None, "600"):
        assert "no sensible size" in assets(lambda t, p, s=size: p["assets"]["words.txt"].update(bytes=s))


def nodes(data: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in nested data, as its path of keys."""
    if path:
        yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from nodes(value, (*path, key))


HOSTILE = [None, True, -1, 0, 3, 10**12, 1.5, "", "embed.weight", [], [[]], [10**12] * 3, {}, {"x": None}, ...]


def test_no_edit_of_the_manifest_gets_past_a_named_error(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every place of the manifest set to every hostile value: it loads, or fails by name and in one line."""
    monkeypatch.setattr("os.fsync", lambda _: None)  # a thousand files
    tensors, plan = parts(saved)
    path, loaded = tmp_path / "f", set()
    places = [place for place in nodes(plan) if place[0] not in ("recipe", "producer")]
    assert len(places) > 60
    for place in places:
        for value in HOSTILE:
            forged = copy.deepcopy(plan)
            home = forged
            for key in place[:-1]:
                home = home[key]
            if value is ...:
                del home[place[-1]]
            else:
                home[place[-1]] = value
            if forged == plan:
                continue
            container.write(path, tensors, forged)
            try:
                fairseq_qn.load(path, "packed", fresh())
                loaded.add(place[0])
            except QNError as error:
                assert "\n" not in str(error) and len(str(error)) < 700, (place, value)
            except BaseException as error:
                raise AssertionError(f"{place} = {value!r} raised {error!r}") from error
    assert loaded <= {
        "source",
        "assets",
        "layers",
        "exponents",
        "parts",
    }  # what a model that is passed in does not need


@pytest.mark.parametrize("source", [{"builder": "none such"}, {"builder": ["x"]}, {"builder": {}}, {"builder": 5}])
def test_unknown_builders(source: Plan, saved: Path, tmp_path: Path) -> None:
    path = forge(saved, tmp_path / "f", lambda t, p: p.update(source=source))
    with pytest.raises(FormatError, match="source.builder: expected one of"):
        fairseq_qn.load(path)


# -- whole files, other models


class Deeper(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra, self.more = nn.Linear(3, 3), nn.Linear(3, 3)


def wider() -> Net:
    model = fresh()
    model.block.fc1 = nn.Linear(8, 24)
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (wider, r"block\.fc1\.weight: shape: expected \[24, 8\], found \[16, 8\] in the file"),
        (Deeper, r"more\.weight: the model has it, the file has not \(2 of \d+ missing\)"),
        (Net, r"extra: left out of the file, but the model has no such module"),
        (lambda: nn.Linear(3, 3), r"extra: left out of the file, but"),
    ],
)
def test_another_model(build: Callable[[], nn.Module], words: str, saved: Path) -> None:
    message = refusal(saved, MismatchError, build())
    assert re.search(words, message) and message.endswith("load it into its own model")


def test_a_model_with_views_takes_no_file(saved: Path) -> None:
    model = fresh()
    fairseq_qn.apply(model, recipe())
    with pytest.raises((MismatchError, UnsupportedError)) as error:
        fairseq_qn.load(saved, model=model)
    assert "\n" not in str(error.value)
