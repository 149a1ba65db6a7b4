"""Damaged, forged and foreign files, as `load` and `inspect` meet them: a named error in one line, and an
untouched model.

Forged files have the right digests, so that only the claim itself can give them away.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import Manifest, Tensors, forge, fresh, one_line, parts, refusal, save_a_file
from small import Net, recipe
from torch import nn

import fairseq_qn
from fairseq_qn.errors import FormatError, MismatchError, UnsupportedError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_a_file(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("version", [0, 4, "2", None, True, 1.5, [1]])
def test_unknown_versions(version: Any, saved: Path, tmp_path: Path) -> None:
    message = refusal(forge(saved, tmp_path / "f", lambda t, p: p.update(version=version)))
    assert f"format version: expected 1 to 3, found {version!r}; read it with the release" in message


@pytest.mark.parametrize("version", [1, 2])
def test_files_of_each_version_load_for_ever(version: int, tmp_path: Path) -> None:
    """Files that were written once; written anew they say the same, and version 1 becomes smaller."""
    old = Path(__file__).parent / "artifact" / "data" / f"version_{version}.qn.safetensors"
    new = forge(old, tmp_path / "f", lambda t, p: p.update(version=2))
    assert fairseq_qn.inspect(old)["version"] == version
    assert (
        new.stat().st_size < 0.7 * old.stat().st_size
        if version == 1
        else new.stat().st_size == old.stat().st_size
    )
    assert (
        fairseq_qn.api.read(old).assets == fairseq_qn.api.read(new).assets == {"words.txt": b"words " * 100}
    )
    for mode in ("dense", "packed"):
        loaded = [fairseq_qn.load(path, mode, fresh()) for path in (old, new)]
        a, b = (model.state_dict() for model in loaded)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        x = torch.randint(0, 20, (2, 5), generator=torch.Generator().manual_seed(0))
        assert loaded[0].embed(x).abs().sum().item() == pytest.approx(20.3558349609375, rel=1e-6)


def test_missing_tensors(saved: Path, tmp_path: Path) -> None:
    tensors, manifest = parts(saved)
    layers = {
        f"{name}/{part}"
        for name in manifest["layers"]
        for part in ("codes", "codebook", "levels", "scale", "zero")
    }
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
            assert "expected" in refusal(
                forge(saved, tmp_path / "f", lambda t, p, n=name, w=wrong: t.update({n: w}))
            )


def test_bits_after_the_last_code(saved: Path, tmp_path: Path) -> None:
    def edit(tensors: Tensors, manifest: Manifest) -> None:
        tensors["conv.weight/codes"][-1] |= 128  # 108 codes of 7 bits are 756 bits, and four are left over

    assert "conv.weight: packed codes: expected zero bits" in refusal(forge(saved, tmp_path / "f", edit))


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
    one_line(error.value)
