"""Claims of a forged manifest, as `load` and `inspect` meet them: refused by name, before memory is taken.

The digests are right, so that only the claim itself can give the file away.
"""

from __future__ import annotations

import bz2
import copy
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from forging import Manifest, Tensors, forge, fresh, one_line, parts, refusal, save_a_file, write

import fairseq_qn
from fairseq_qn.errors import FormatError, QNError
from fairseq_qn.schemes import blocks, integer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_a_file(tmp_path_factory.mktemp("saved"))


def test_a_manifest_that_claims_10_to_the_12_elements(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = [
        *(
            {"shape": shape}
            for shape in (
                [10**12, 8],
                [10**6, 10**6],
                [2, 10**12],
                [10**19, 2],
                [20, 8, 10**12],
                [10**300, 8],
            )
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
                for scheme in (blocks, integer):
                    patch.setattr(scheme, "unpack", lambda *_: pytest.fail("unpacked"))
                assert f"layer {layer!r}: " in refusal(path)
                with pytest.raises(FormatError):
                    fairseq_qn.inspect(path)


FIELDS = [
    *(("embed.weight", "padding_idx", value) for value in (20, -1, 1.0, True, "1")),
    *(("embed.weight", "exponent", value) for value in (1001, 10**12, -1001, 0.5, None)),
    *(("embed.weight", "pad", value) for value in (0, 1001, None, True)),  # of a pad row that is not there
    *(("embed.weight", "scheme", value) for value in ("pq", None)),
    *(("block.fc1.weight", "bits", value) for value in (1, 9, 3.0, None)),
    *(("block.fc1.weight", "granularity", value) for value in ("row", None)),
    *(("block.fc1.weight", "group_size", value) for value in (0, 3, None)),
]


@pytest.mark.parametrize(("layer", "field", "value"), FIELDS)
def test_fields_out_of_range(layer: str, field: str, value: Any, saved: Path, tmp_path: Path) -> None:
    path = forge(saved, tmp_path / "f", lambda t, p: p["layers"][layer].update({field: value}))
    assert f"layer {layer!r}: " in refusal(path)


@pytest.mark.parametrize("exponent", [1001, -1001, 10**12, 0.5, None, "1"])
def test_exponents_out_of_range(exponent: Any, saved: Path, tmp_path: Path) -> None:
    path = forge(saved, tmp_path / "f", lambda t, p: p["exponents"].update({"block.norm.bias": exponent}))
    assert "block.norm.bias: exponent: expected a small whole number" in refusal(path)


def test_files_inside_that_are_not_what_they_say(saved: Path, tmp_path: Path) -> None:
    def assets(edit: Callable[[Tensors, Manifest], object]) -> str:
        with pytest.raises(FormatError) as error:
            _ = fairseq_qn.api.read(forge(saved, tmp_path / "f", edit)).assets["words.txt"]
        message = one_line(error.value)
        assert "asset 'words.txt'" in message
        return message

    for codec in (zlib, bz2):
        bomb = torch.frombuffer(bytearray(codec.compress(bytes(1 << 26), 9)), dtype=torch.uint8)

        def swell(
            tensors: Tensors, manifest: Manifest, bomb: torch.Tensor = bomb, name: str = codec.__name__
        ) -> None:
            tensors["asset:words.txt"] = bomb
            manifest["assets"]["words.txt"]["codec"] = name

        assert "expected 600 bytes, found 601+" in assets(swell)
    assert "cannot be unpacked" in assets(lambda t, p: p["assets"]["words.txt"].update(codec="bz2"))
    for name in ("lzma", "", None, 5, ["zlib"]):
        assert "codec: expected zlib or bz2" in assets(
            lambda t, p, n=name: p["assets"]["words.txt"].update(codec=n)
        )
    assert "expected 601 bytes, found 600" in assets(lambda t, p: p["assets"]["words.txt"].update(bytes=601))
    assert "expected 599 bytes, found 600+" in assets(
        lambda t, p: p["assets"]["words.txt"].update(bytes=599)
    )
    assert "cannot be unpacked" in assets(lambda t, p: t["asset:words.txt"].zero_())
    for size in (-1, None, "600"):
        assert "no sensible size" in assets(lambda t, p, s=size: p["assets"]["words.txt"].update(bytes=s))


def nodes(data: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in nested data, as its path of keys."""
    if path:
        yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from nodes(value, (*path, key))


HOSTILE = [
    None,
    True,
    -1,
    0,
    3,
    10**12,
    1.5,
    "",
    "embed.weight",
    [],
    [[]],
    [10**12] * 3,
    {},
    {"x": None},
    ...,
]


def test_no_edit_of_the_manifest_gets_past_a_named_error(saved: Path, tmp_path: Path) -> None:
    """Every place of the manifest set to every hostile value: it loads, or fails by name and in one line."""
    tensors, manifest = parts(saved)
    path, loaded = tmp_path / "f", set()
    places = [place for place in nodes(manifest) if place[0] not in ("recipe", "producer")]
    assert len(places) > 60
    for place in places:
        for value in HOSTILE:
            forged = copy.deepcopy(manifest)
            home = forged
            for key in place[:-1]:
                home = home[key]
            if value is ...:
                del home[place[-1]]
            else:
                home[place[-1]] = value
            if forged == manifest:
                continue
            write(path, tensors, forged)
            try:
                fairseq_qn.load(path, "packed", fresh())
                loaded.add(place[0])
            except QNError as error:
                one_line(error)
            except BaseException as error:
                raise AssertionError(f"{place} = {value!r} raised {error!r}") from error
    assert loaded <= {
        "source",
        "assets",
        "modules",
        "layers",
        "exponents",
        "parts",
        "version",  # a newer one than it needs
    }  # what a model that is passed in does not need


@pytest.mark.parametrize(
    "source", [{"builder": "none such"}, {"builder": ["x"]}, {"builder": {}}, {"builder": 5}]
)
def test_unknown_builders(source: Manifest, saved: Path, tmp_path: Path) -> None:
    path = forge(saved, tmp_path / "f", lambda t, p: p.update(source=source))
    with pytest.raises(FormatError, match="source.builder: expected one of"):
        fairseq_qn.load(path)
