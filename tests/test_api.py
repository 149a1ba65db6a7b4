"""save and load: the loaded model answers as the frozen one does, and the sizes are those of the disk."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from small import (
    LAYERS,
    MODES,
    SCHEMES,
    STAGES,
    Net,
    answers,
    assert_answers,
    frozen,
    loss,
    recipe,
)  # fmt: skip
from torch import Tensor, nn

import fairseq_qn
from fairseq_qn import api
from fairseq_qn.artifact import container
from fairseq_qn.errors import UnsupportedError
from fairseq_qn.modules import export
from fairseq_qn.modules.digest import sign
from fairseq_qn.modules.view import views_of


class Table(nn.Module):
    """Enough blocks for codes of 16 bits, in 16 or 32 of memory."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.table = nn.Embedding(2100, 16, padding_idx=4)
        self.register_buffer("steps", torch.tensor(2**40))
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids)


def rounded(model: nn.Module, scheme: str) -> nn.Module:
    """A dense model with what `model` reads, rounded to fp16 once; integers are stored exactly."""
    whole = SCHEMES[scheme].get("scheme") == "integer" or "codebook_bits" in SCHEMES[scheme]
    twin, exact = Net(), LAYERS if whole else ()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            module, kind = name.rsplit(".", 1)
            value = getattr(model.get_submodule(module), kind)
            parameter.copy_(value if module in exact and kind == "weight" else value.half())
    return twin.eval()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_loaded_model_answers_as_the_frozen_one(scheme: str, mode: str, tmp_path: Path) -> None:
    model = frozen(**SCHEMES[scheme])
    for parts, tolerance in (("float32", 0), ("float16", 1e-3)):
        expected = answers(model if parts == "float32" else rounded(model, scheme))
        fairseq_qn.save(model, tmp_path / "m", parts=parts)
        loaded = fairseq_qn.load(tmp_path / "m", mode, Net())
        assert not loaded.training and not any(module.training for module in loaded.modules())
        assert_answers(answers(loaded), expected, mode)
        torch.testing.assert_close(expected, answers(model), rtol=0, atol=3 * tolerance)
        for name in [*LAYERS, "head"]:
            weight, expected = loaded.get_submodule(name).weight, model.get_submodule(name).weight
            torch.testing.assert_close(
                weight + 0, expected + 0, rtol=tolerance, atol=tolerance * 0.1, check_dtype=True
            )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_dense_answers_are_equal_whatever_the_layout_of_the_input(mode: Any, tmp_path: Path) -> None:
    """matmul folds a batch or not by its strides and by whether the weight takes a gradient: here both take
    one.
    """
    model = nn.Sequential(nn.Linear(64, 48, bias=False))
    fairseq_qn.apply(
        model, {"version": 1, "rules": [{"layers": "0", "scheme": "product", "n_centroids": 16}]}
    )
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, tmp_path / "m", parts="float32")
    loaded = fairseq_qn.load(tmp_path / "m", model=nn.Sequential(nn.Linear(64, 48, bias=False)))
    for x in (
        torch.randn(7, 5, 64),
        torch.randn(5, 7, 64).transpose(0, 1),
        torch.randn(7, 64, 5).transpose(1, 2),
    ):
        with mode():
            found, expected = loaded[0].weight, model[0].weight
            assert torch.equal(found, expected) and found.requires_grad and expected.requires_grad
            assert torch.equal(loaded(x), model(x)) and torch.equal(x @ found.t(), x @ expected.t())


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_dense_model_trains_on_as_any_other(device: str, tmp_path: Path) -> None:
    """All of it, frozen layers too, as the same weights would in a model that never was quantised."""
    fairseq_qn.save(frozen(), tmp_path / "m", parts="float32")
    with torch.device(device):
        fresh = Net()
    loaded, twin = fairseq_qn.load(tmp_path / "m", model=fresh).train(), Net().train()
    twin.load_state_dict(loaded.state_dict())
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    for model in (loaded, twin):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    for (name, tensor), expected in zip(
        loaded.state_dict().items(), twin.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(tensor, expected, msg=name)
        assert name.endswith("k_proj.bias") or not torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("k", [257, 32_768, 32_769])
@pytest.mark.parametrize("mode", MODES)
def test_codes_of_many_bits(k: int, mode: str, tmp_path: Path) -> None:
    model = Table().eval()
    rule = {"layers": "table", "scheme": "product", "block_size": 1, "n_centroids": k}
    fairseq_qn.apply(model, {"version": 1, "rules": [rule]})
    fairseq_qn.freeze(model, iterations=1)
    size = fairseq_qn.save(model, tmp_path / "m", parts="float32")
    bits = (k - 1).bit_length()
    assert size.parts["codes"] == 2100 * 16 * bits // 8 and size.parts["codebooks"] == 4 * k
    loaded = fairseq_qn.load(tmp_path / "m", mode, Table())
    ids = torch.arange(2100)
    assert torch.equal(loaded(ids), model(ids)) and not loaded(ids)[4].any()
    assert loaded.steps == 2**40 and loaded.flags.tolist() == [True, False]


# -- refusals that change nothing


def test_what_is_not_frozen_is_not_saved(tmp_path: Path) -> None:
    model = frozen()
    fairseq_qn.save(model, tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    half = Net()
    fairseq_qn.apply(half, recipe())
    fairseq_qn.freeze(half, "emb")
    with pytest.raises(
        UnsupportedError, match=r"^save: stages \['conv', 'ffn'\] are not frozen yet; call fairseq_qn.freeze"
    ):
        fairseq_qn.save(half, tmp_path / "m")
    with pytest.raises(UnsupportedError, match="^save: the model carries no recipe"):
        fairseq_qn.save(Net(), tmp_path / "m")
    with pytest.raises(
        UnsupportedError, match=r"^save: parts: expected one of \['float16', 'float32'\], found 'int8'"
    ):
        fairseq_qn.save(model, tmp_path / "m", parts="int8")
    with pytest.raises(OSError, match="cannot write"):
        fairseq_qn.save(model, tmp_path / "no" / "such" / "folder")
    assert (tmp_path / "m").read_bytes() == before and os.listdir(tmp_path) == ["m"]
    assert set(STAGES.values()) == {"emb", "conv"}


@pytest.mark.parametrize("stop", ["os.fsync", "os.replace", "fairseq_qn.artifact.header.encode"])
def test_stopping_while_saving_keeps_the_old_file(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = frozen()
    fairseq_qn.save(model, tmp_path / "m")
    before = (tmp_path / "m").read_bytes()

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stop, interrupt)
        fairseq_qn.save(model, tmp_path / "m", parts="float32")
    assert (tmp_path / "m").read_bytes() == before and os.listdir(tmp_path) == ["m"]


def test_what_load_needs(tmp_path: Path) -> None:
    fairseq_qn.save(frozen(), tmp_path / "m")
    with pytest.raises(
        UnsupportedError, match=r"m: the file does not say how to build its model; pass a fresh dense one"
    ):
        fairseq_qn.load(tmp_path / "m")
    with pytest.raises(
        UnsupportedError, match="^load: mode: expected dense, packed or integer, found 'sparse'"
    ):
        fairseq_qn.load(tmp_path / "m", "sparse", Net())
    with pytest.raises(FileNotFoundError):
        fairseq_qn.load(tmp_path / "none", model=Net())


# -- elsewhere, and later


def test_inspect_is_plain_data(tmp_path: Path) -> None:
    size = fairseq_qn.save(frozen(), tmp_path / "m", source={"name": "mine"}, assets={"x": b""})
    manifest = fairseq_qn.inspect(str(tmp_path / "m"))
    assert json.loads(json.dumps(manifest)) == manifest and manifest["size"] == size.to_dict()
    assert manifest["source"] == {"name": "mine"} and manifest["assets"] == {
        "x": {"bytes": 0, "codec": "zlib"}
    }
    assert fairseq_qn.Recipe.load(manifest["recipe"]) == fairseq_qn.Recipe.load(recipe())


def test_files_travel_along(tmp_path: Path) -> None:
    files = {"bpe/encoder.json": bytes(range(256)) * 50, "empty": b"", "ünï": b"x"}
    fairseq_qn.save(frozen(), tmp_path / "m", assets=files)
    assert fairseq_qn.api.read(tmp_path / "m").assets == files


def test_a_fresh_process_in_another_directory(tmp_path: Path) -> None:
    model = frozen()
    fairseq_qn.save(model, tmp_path / "m", parts="float32")
    torch.save(answers(model), tmp_path / "answers.pt")
    code = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torch, fairseq_qn
        from small import IDS, Net, assert_answers
        for mode in ("dense", "packed"):
            with torch.no_grad():
                found = fairseq_qn.load({str(tmp_path / "m")!r}, mode, Net(9))(IDS)
            assert_answers(found, torch.load({str(tmp_path / "answers.pt")!r}), mode)
            print("same")
    """
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=elsewhere,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["same", "same"], done.stderr
    assert os.listdir(elsewhere) == []


@pytest.mark.parametrize("padded", [False, True])
def test_what_a_file_says_does_not_drift(
    padded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sha256 of the manifest, with those of the tensors, of a small file from fixed weights.

    Where the format changes on purpose, its version changes with this.
    """
    monkeypatch.setattr(export, "PRODUCER", "golden")
    model = nn.Sequential(
        nn.Embedding(6, 8, padding_idx=0), nn.Linear(8, 6), nn.Linear(6, 6, bias=False), nn.Conv2d(2, 3, 3)
    )
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            values = (torch.arange(parameter.numel()) * 7 % 23 - 11).reshape(parameter.shape)
            parameter.copy_(values * 2.0 ** (-3 * i))
        model[0].weight[0] *= padded
    rules = [
        {"layers": "0", "scheme": "product", "block_size": 4, "n_centroids": 3, "stage": "emb"},
        {"layers": "1", "scheme": "integer", "bits": 4, "granularity": "channel"},
        {"layers": "3", "scheme": "product", "block_size": 9, "n_centroids": 256},
    ]
    fairseq_qn.apply(model, {"version": 1, "rules": rules, "keep": ["2"]})
    fairseq_qn.freeze(model)
    model[0].codes.copy_(torch.arange(12).reshape(6, 2) % 3)  # whatever k-means may do on another machine
    model[3].codes.copy_(torch.arange(6).reshape(3, 2))
    for view in views_of(model):
        sign(view)
    size = fairseq_qn.save(model, tmp_path / "m", drop=["2"], source={"from": "test"})
    assert (tmp_path / "m").stat().st_size == size.total
    manifest = container.read_manifest(tmp_path / "m")
    conv = (
        "Conv2d kernel_size=3,3 stride=1,1 padding=0,0 output_padding=0,0 dilation=1,1 groups=1 "
        "padding_mode=zeros"
    )
    assert manifest.pop("modules") == {
        "Sequential size=4": [""],
        "Embedding padding_idx=0 norm_type=2.0": ["0"],
        "Linear": ["1"],
        conv: ["3"],
    }
    said = json.dumps(manifest, sort_keys=True)
    assert hashlib.sha256(said.encode()).hexdigest() == GOLDEN[padded]


GOLDEN = {
    False: "6368223b1c444d3b57d88a52c886bb680d344f174b2f66fd90a55267131f3b8b",
    True: "72d121508d5cdbc5e9f452917c6090678044cee48068ae50934dffdd4505d78b",
}


def test_a_file_in_memory_loads_once(tmp_path: Path) -> None:
    """Its packed parts are freed as they are unpacked: a second call says so."""
    fairseq_qn.save(frozen(), tmp_path / "a.qn.safetensors")
    file = api.read(tmp_path / "a.qn.safetensors")
    file.load(model=Net())
    with pytest.raises(UnsupportedError, match="was loaded before, which freed its parts; read it again"):
        file.load(model=Net())
