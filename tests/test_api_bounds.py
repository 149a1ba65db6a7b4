"""What a file may ask for: a small one cannot make a reader work long or take memory, and none that it
refuses is written.
"""

from __future__ import annotations

import bz2
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import Manifest, Tensors, forge, fresh, refusal, save_a_file
from torch import nn

import fairseq_qn
from fairseq_qn.artifact import manifest
from fairseq_qn.artifact.manifest import pack_asset
from fairseq_qn.errors import FormatError, UnsupportedError
from fairseq_qn.recipe import Recipe


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_a_file(tmp_path_factory.mktemp("saved"))


HUGE = int("9" * 4000)


@pytest.mark.parametrize("shape", [[9] * 200_000, [HUGE] * 200, [HUGE, HUGE], [1, HUGE], [2] * 65], ids=len)
def test_shapes_whose_product_alone_would_take_minutes(
    shape: list[int], saved: Path, tmp_path: Path
) -> None:
    for layer in ("embed.weight", "block.fc1.weight"):
        path = forge(saved, tmp_path / "f", lambda t, p, n=layer: p["layers"][n].update(shape=shape))
        assert "expected a shape of two or more sizes" in refusal(path)


def test_braces_in_a_name_or_the_path(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "{0}{x!r}").mkdir()
    for layer in ("{}", "{0.__class__}", "%s{path}"):
        for entry in (
            5,
            {"shape": [2, 2]},
            {"shape": [2, 2], "scheme": "product"},
            {"scheme": "{}", "shape": [1, 1]},
        ):
            path = forge(
                saved,
                tmp_path / "{0}{x!r}" / "f{}",
                lambda t, p, n=layer, e=entry: p["layers"].update({n: e}),
            )
            assert f"layer {layer!r}: " in refusal(path)


REPEATED = [
    {"ties": [["embed.weight", "head.weight"]] * 2},
    {"ties": [["embed.weight", "head.weight", "head.weight"]]},
    {"ties": [["embed.weight", "head.weight"], ["conv.weight", "head.weight"]]},
    {"dropped": ["extra"] * 20_000},
]


@pytest.mark.parametrize("claim", REPEATED, ids=str)
def test_names_that_occur_twice(claim: Manifest, saved: Path, tmp_path: Path) -> None:
    assert "each once" in refusal(forge(saved, tmp_path / "f", lambda t, p: p.update(claim)))


def test_a_regular_expression_in_the_recipe_is_never_run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = {"layers": "(a|a?)+" * 30, "scheme": "product"}
    path = forge(saved, tmp_path / "f", lambda t, p: p["recipe"].update(rules=[rule] * 100, keep=["(" * 50]))
    monkeypatch.setattr(Recipe, "load", lambda *_: pytest.fail("read the recipe"))
    monkeypatch.setattr(re, "compile", lambda *_: pytest.fail("compiled"))
    assert fairseq_qn.inspect(path)["recipe"]["keep"] == ["(" * 50]
    for mode in ("dense", "packed"):
        fairseq_qn.load(path, mode, fresh())


# -- weights that decode to far more than is stored


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64, bias=False)


def wide(block_size: int = 64) -> nn.Module:
    model, rule = Wide(), {"layers": "fc", "scheme": "product", "block_size": block_size, "n_centroids": 2}
    fairseq_qn.apply(model, {"version": 1, "rules": [rule]})
    fairseq_qn.freeze(model)
    return model


def test_weights_far_larger_than_the_file(tmp_path: Path) -> None:
    """One bit for 4096 weights: 64 kB for 8.6 GB."""
    fairseq_qn.save(wide(), tmp_path / "m")

    def edit(tensors: Tensors, manifest: Manifest) -> None:
        manifest["layers"]["fc.weight"].update(shape=[1 << 19, 4096], block_size=4096)
        tensors["fc.weight/codes"] = torch.zeros(1 << 16, dtype=torch.uint8)
        tensors["fc.weight/codebook"] = torch.zeros(2, 4096, dtype=torch.float16)

    path = forge(tmp_path / "m", tmp_path / "f", edit)
    found = r"layers in fp32: expected at most \d+ bytes out of \d+, found 8589934592"
    assert re.search(found, refusal(path, model=Wide()))
    with pytest.raises(FormatError, match=found):
        fairseq_qn.inspect(path)


def test_what_no_reader_would_take_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m"
    fairseq_qn.save(wide(), path)
    before = path.read_bytes()
    monkeypatch.setattr(manifest, "DECODED_BASE", 0)
    monkeypatch.setattr(manifest, "DECODED_TIMES", 40)
    with pytest.raises(
        UnsupportedError, match="save: layers in fp32: expected at most .* use smaller blocks"
    ):
        fairseq_qn.save(wide(), path)
    assert path.read_bytes() == before
    fairseq_qn.save(wide(block_size=1), path)
    with pytest.raises(UnsupportedError, match="save: files inside, unpacked: expected at most"):
        fairseq_qn.save(wide(block_size=1), path, assets={"zeros": bytes(manifest.ASSETS_BASE + 1000)})


# -- files that travel inside


def test_assets_are_unpacked_only_when_they_are_asked_for(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked: list[str] = []

    def watched(codec: Any, maker: str) -> Callable:
        make = getattr(codec, maker)
        return lambda: (unpacked.append(codec.__name__), make())[1]

    def more(tensors: Tensors, manifest: Manifest) -> None:
        manifest["assets"]["other"], tensors["asset:other"] = pack_asset(b"other")

    path = forge(saved, tmp_path / "f", more)
    monkeypatch.setattr(
        manifest,
        "zlib",
        type("", (), {"decompressobj": watched(zlib, "decompressobj"), "error": zlib.error}),
    )
    monkeypatch.setattr(manifest, "bz2", type("", (), {"BZ2Decompressor": watched(bz2, "BZ2Decompressor")}))
    assets = fairseq_qn.api.read(path).assets
    fairseq_qn.load(path, model=fresh())
    assert [*assets] == ["other", "words.txt"] and len(assets) == 2 and "other" in assets and not unpacked
    assert assets["other"] == b"other" and len(unpacked) == 1
    assert assets == {"words.txt": b"words " * 100, "other": b"other"}


def test_many_bombs_are_refused_before_any_is_unpacked(saved: Path, tmp_path: Path) -> None:
    """Each within its own bound: 13 files of 256 MB in 160 kB."""
    bomb = torch.frombuffer(bytearray(bz2.compress(bytes(1 << 20), 9)), dtype=torch.uint8)

    def edit(tensors: Tensors, manifest: Manifest) -> None:
        for i in range(13):
            manifest["assets"][f"{i}"], tensors[f"asset:{i}"] = (
                {"bytes": 1 << 28, "codec": "bz2"},
                bomb.clone(),
            )

    with pytest.raises(FormatError, match="files inside, unpacked: expected at most .* found 348"):
        _ = fairseq_qn.api.read(forge(saved, tmp_path / "f", edit)).assets


# -- NaN and Inf


def part(name: str, value: Any) -> Callable[[Tensors, Manifest], object]:
    return lambda tensors, manifest: tensors[name].view(-1).__setitem__(-1, value)


NOT_FINITE = {
    "nan": part("embed.weight/codebook", float("nan")),
    "inf": part("embed.weight/codebook", float("inf")),
    "exponent": lambda t, p: p["layers"]["embed.weight"].update(exponent=1000),
    "scale": part("block.fc1.weight/scale", float("nan")),
    "scale that overflows": part("block.fc1.weight/scale", 3e38),
}


@pytest.mark.parametrize("kind", NOT_FINITE)
def test_a_file_of_such_a_layer_is_not_loaded(kind: str, saved: Path, tmp_path: Path) -> None:
    layer = "block.fc1.weight" if "scale" in kind else "embed.weight"
    assert f"{layer}: expected finite weights, found NaN or Inf" in refusal(
        forge(saved, tmp_path / "f", NOT_FINITE[kind])
    )


def test_the_largest_integers_that_fp32_holds_still_load(tmp_path: Path) -> None:
    model = Wide()
    with torch.no_grad():
        model.fc.weight.copy_(torch.linspace(-1, 1, 64 * 64).mul(3e38).view(64, 64))
    fairseq_qn.apply(model, {"version": 1, "rules": [{"layers": "fc", "scheme": "integer", "bits": 8}]})
    fairseq_qn.freeze(model)
    fairseq_qn.save(model, tmp_path / "m")
    assert torch.isfinite(fairseq_qn.load(tmp_path / "m", model=Wide()).fc.weight).all()
