"""Forged metadata and manifests under the right digest: refused with one line, and before they take
memory.
"""

from __future__ import annotations

import json
import tracemalloc
import zlib
from base64 import b85encode
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import forge, forge_text, parts, small
from forging import assert_refused

from fairseq_qn.artifact import header, strict_json
from fairseq_qn.artifact.container import read, write
from fairseq_qn.errors import EncodeError, FormatError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small, whole file."""
    path = tmp_path / "m.qn.safetensors"
    write(path, small(), {"version": 1})
    return path


BAD_MANIFESTS = [
    *("", "{", "5", "null", "[]", "[[]]", "{}", '{"tensors": []}', '{"tensors": null}', "[" * 100_000),
    *('{"tensors": {}, "tensors": {}}', '{"tensors": {}, "a": NaN}', '{"tensors": {}, "a": -Infinity}'),
    '{"tensors": {}, "a": ' + "9" * 5000 + "}",
]


@pytest.mark.parametrize("manifest", BAD_MANIFESTS, ids=lambda text: text[:30])
def test_forged_manifests(manifest: str, path: Path) -> None:
    forge(path, {}, manifest, b"", 1)
    assert_refused(path, "header: expected the (metadata and manifest|tensors and metadata)")
    if manifest != "{}":  # which is all that version 2 needs
        forge(path, {}, manifest, b"")
        assert_refused(path, "header: expected the metadata and manifest")


def test_manifests_that_do_not_inflate(path: Path) -> None:
    """Cut short, with a tail, of other bytes, or far larger than they look; the last takes no memory."""
    good = zlib.compress(b"{}")
    forge(path, {}, "", b"", manifest=b85encode(good).decode())
    assert read(path)[1] == {"tensors": {}}
    bomb = zlib.compress(b" " * (1 << 26) + b"{}", 9)
    many = zlib.compress(b"[" + b"{}," * (1 << 22) + b"{}]", 9)
    for wrong in (b"", good[:-1], good + b"x", b"{}", bytes(9), bomb, many):
        forge(path, {}, "", b"", manifest=b85encode(wrong).decode())
        tracemalloc.start()
        assert_refused(path, "header: expected the metadata and manifest")
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
        tracemalloc.stop()


@pytest.mark.parametrize("version", ["0", "3", "", "2 ", 2, None, [1], {}])
def test_headers_of_other_versions(version: Any, path: Path) -> None:
    forge(path, *parts(path), 2, version=version)
    assert_refused(path, "format version: expected one of 1, 2, found .*; read it with the release")


def test_forged_metadata(path: Path) -> None:
    good = (
        '{"__metadata__":{"format":"fairseq_qn","manifest":"{\\"tensors\\":{}}","header_sha256":"'
        + "0" * 64
        + '"}}'
    )
    forge_text(path, good, b"")
    assert read(path)[0] == {}
    other = [
        *(
            good.replace("fairseq_qn", "pt"),
            good.replace('"format"', '"fmt"'),
            good.replace("__metadata__", "metadata"),
        ),
        *(good.replace('"format"', '"more":"","format"'), good.replace('"{\\"tensors\\":{}}"', "{}")),
        *(
            good.replace('"format"', '"version":"2","format"'),
            good.replace('"format"', '"version":"1","format"'),
        ),
        *(good + "x", good[:-1], "[" + good + "]", good[:-1] + ',"__metadata__":{}}', "[" * 100_000 + good),
        good.replace('{"__m', '{"a":{"header_sha256":"' + "0" * 64 + '"},"__m'),
    ]
    for text in other:
        forge_text(path, text, b"")
        assert_refused(path, "header")
    body = good.encode("utf-16-le")
    path.write_bytes(len(body).to_bytes(8, "little") + body)
    assert_refused(path, "header")


def test_json_of_too_many_or_too_deep_lists_is_neither_written_nor_read() -> None:
    deep: Any = 0
    for _ in range(strict_json.MAX_DEPTH):
        deep = [deep]
    assert strict_json.loads(strict_json.dumps(deep)) == deep
    many = [[]] * strict_json.MAX_NESTED
    for data in ([deep], {"a": deep}, many, [{}] * strict_json.MAX_NESTED):
        with pytest.raises(ValueError, match="more than"):
            strict_json.loads(json.dumps(data))
        with pytest.raises(EncodeError, match="more than"):
            header.encode({}, {"x": data}, {})


def test_more_tensors_than_a_file_may_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {str(i): torch.zeros(0) for i in range(20)}
    write(tmp_path / "f", tensors, {})
    monkeypatch.setattr(header, "MAX_TENSORS", 19)
    with pytest.raises(FormatError, match="tensors: expected at most 19, found 20"):
        read(tmp_path / "f")
    with pytest.raises(EncodeError, match="expected at most 19 tensors, found 20"):
        write(tmp_path / "g", tensors, {})
