"""Damaged, foreign and forged files: each is refused with one line, and nothing in it is run or believed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from base64 import b85encode
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from by_hand import forge, parts, same, small
from forging import READERS, Bomb, assert_refused

import fairseq_qn
from fairseq_qn.artifact import header
from fairseq_qn.artifact.container import read, read_manifest, write
from fairseq_qn.errors import FormatError

MANIFEST = {
    "version": 1,
    "recipe": {"rules": [{"layers": ".*", "p": 0.1}]},
    "words": ["naïve", '"quoted"', "\n\x00", "猫"],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small, whole file."""
    path = tmp_path / "two  spaces.qn.safetensors"
    write(path, small(), MANIFEST)
    return path


def test_every_flipped_byte_is_found(path: Path) -> None:
    whole = path.read_bytes()
    body = 8 + int.from_bytes(whole[:8], "little")
    for position in range(len(whole)):
        flipped = whole[position] ^ (1 << position % 8)
        path.write_bytes(whole[:position] + bytes([flipped]) + whole[position + 1 :])
        assert_refused(path, readers=READERS if position < body else (read,))
    path.write_bytes(whole)
    assert read(path)[0].keys() == small().keys()


def test_padding_is_under_the_digest(tmp_path: Path) -> None:
    """The file above may have no padding, so one that has is flipped in it."""
    for letters in range(8):
        path = tmp_path / str(letters)
        write(path, {}, {"a": "x" * letters})
        whole = path.read_bytes()
        padding = len(whole) - len(whole.rstrip(b" "))
        assert len(whole) % 8 == 0
        for position in range(len(whole) - padding, len(whole)):
            path.write_bytes(whole[:position] + b"\n" + whole[position + 1 :])  # still the same JSON
            assert_refused(path, "sha256")


def test_every_truncation_and_any_tail_is_found(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert_refused(path)
    for tail in (b"\0", b" " * 8, whole):
        path.write_bytes(whole + tail)
        assert_refused(path, "cut short or has a tail")


def test_a_file_cut_while_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks of the size have passed when the data go away."""
    decode = header.decode

    def decode_then_cut(file: Any, name: Any) -> Any:
        result = decode(file, name)
        os.truncate(path, path.stat().st_size - 1)
        return result

    write(path, {"a": torch.zeros(100_000)}, {})  # larger than what is read ahead
    monkeypatch.setattr(header, "decode", decode_then_cut)
    with pytest.raises(FormatError, match="end of the file"):
        read(path)


def test_things_that_are_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none")
    assert_refused(tmp_path, "directory")
    assert_refused(Path("/dev/null"), "device")
    os.mkfifo(tmp_path / "pipe")  # to open it would wait for ever
    assert_refused(tmp_path / "pipe", "device")
    for content in (
        b"",
        b"\0" * 7,
        b"\0" * 8,
        b"\0" * 100,
        b"\xff" * 100,
        (10**12).to_bytes(8, "little") + b"{}",
    ):
        (tmp_path / "f").write_bytes(content)
        assert_refused(tmp_path / "f", "header")
    safetensors.torch.save_file(small(), tmp_path / "f")
    assert_refused(tmp_path / "f", "header_sha256")
    safetensors.torch.save_file(small(), tmp_path / "f", {"format": "pt"})
    assert_refused(tmp_path / "f", "header_sha256")


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    path, trace = tmp_path / "m.qn.safetensors", tmp_path / "it-ran"
    readers = (*READERS, fairseq_qn.load, fairseq_qn.inspect)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(Bomb(trace), protocol))
        assert_refused(path, "header|a pickle or zip", readers)
    for zipped in (False, True):
        torch.save({"a": torch.ones(2), "b": Bomb(trace)}, path, _use_new_zipfile_serialization=zipped)
        assert_refused(path, "a pickle or zip, as torch.save writes", readers)
    assert not trace.exists()
    with path.open("rb") as file:
        torch.load(file, weights_only=False)
    assert trace.exists()  # the bomb was live


def test_a_header_beyond_the_cap(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header, "MAX_HEADER_BYTES", 500)
    assert_refused(path, "header length: expected at most 500")


# The header digest is right from here on; the claims are not.


def entry(dtype: str, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


VERSIONS = pytest.mark.parametrize("version", [1, 2])


@VERSIONS
def test_the_forger_can_write_a_good_file(version: int, path: Path) -> None:
    """So what the tests below see refused is the forged claim and nothing else."""
    forge(path, *parts(path), version)
    assert all(same(tensor, small()[name]) for name, tensor in read(path)[0].items())


def test_missing_and_extra_tensors(path: Path) -> None:
    """Of the table that version 1 has."""
    head, manifest, data = parts(path)
    absent = {
        **manifest,
        "tensors": {**manifest["tensors"], "gone": {"dtype": "U8", "shape": [0], "sha256": ""}},
    }
    forge(path, head, absent, data, 1)
    assert_refused(path, "1 missing, first 'gone'")
    forge(path, {**head, "more": entry("U8", [1], len(data), len(data) + 1)}, manifest, data + b"\0", 1)
    assert_refused(path, "1 extra, first 'more'")


def test_the_table_and_the_tensors_must_agree(path: Path) -> None:
    head, manifest, data = parts(path)
    record = manifest["tensors"]["codebook"]
    for wrong in (
        {**record, "shape": [4]},
        {**record, "dtype": "I16"},
        {**record, "more": 1},
        {},
        None,
        [],
        "F16",
    ):
        forge(path, head, {**manifest, "tensors": {**manifest["tensors"], "codebook": wrong}}, data, 1)
        assert_refused(path, "tensor 'codebook'")
    for sha256 in ("0" * 64, "", None, 5):
        table = {**manifest["tensors"], "codebook": {**record, "sha256": sha256}}
        forge(path, head, {**manifest, "tensors": table}, data, 1)
        assert_refused(path, "tensor 'codebook': expected sha256", readers=(read,))
        assert read_manifest(path)["version"] == 1


def test_digests(path: Path) -> None:
    """Those of version 2: one for each tensor, in the order of the names."""
    head, manifest, data = parts(path)
    good = b"".join(bytes.fromhex(record["sha256"]) for _, record in sorted(manifest["tensors"].items()))
    for wrong in (b"", good[:-1], good + bytes(32), good[:-32]):
        forge(path, head, manifest, data, digests=b85encode(wrong).decode())
        assert_refused(path, f"{len(wrong)} bytes of digests for 4 tensors")
    forge(path, head, manifest, data, digests=b85encode(good[32:] + good[:32]).decode())
    assert_refused(path, "expected sha256", readers=(read,))
    for wrong in ('"', "~~~~~", "é", "a", 5, None):
        forge(path, head, manifest, data, digests=wrong)
        assert_refused(path, "header: expected the metadata and manifest")


CLAIMS = [
    *(
        entry("F32", [10**12], 0, 4 * 10**12),
        entry("F32", [10**12], 0, 4),
        entry("F32", [10**6, 10**6], 0, 4),
    ),
    *(
        entry("F32", [2**32, 2**32], 0, 4),
        entry("F32", [2**32, 2**32], 0, 2**66),
        entry("F32", [2**63], 0, 0),
    ),
    *(
        entry("F32", [0, 2**62, 2**62], 0, 0),
        entry("F32", [10**4000, 0], 0, 0),
        entry("F32", [1] * 65, 0, 4),
    ),
    *(entry("F32", shape, 0, 4) for shape in ([-1, -1], [True], [1.0], ["1"], [2], [[1]], None, {}, "1")),
    *(
        entry("F32", [1], *offsets)
        for offsets in ([4, 0], [4, 8], [-4, 0], [0.0, 4], [False, 4], [0, 4, 4], [0], [])
    ),
    *(
        entry("F32", [1], None, 4),
        entry("U8", [4], "0", "4"),
        {"dtype": "U8", "shape": [4], "data_offsets": None},
    ),
    *(entry(dtype, [1], 0, 4) for dtype in ("F33", "f32", "C64", None, [], 4)),
    *({**entry("F32", [1], 0, 4), "more": 1}, {"dtype": "F32", "shape": [1]}, {}, [], None, 5, "text"),
]


@VERSIONS
@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: json.dumps(claim)[:60])
def test_impossible_claims_fail_without_allocation(
    claim: Any, version: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = claim if isinstance(claim, dict) else {}
    data = b"" if given.get("data_offsets") == [0, 0] else bytes(4)  # so that only the claim itself is wrong
    record = {
        "sha256": hashlib.sha256(data).hexdigest(),
        "dtype": given.get("dtype"),
        "shape": given.get("shape"),
    }
    forge(path, {"a": claim}, {"tensors": {"a": record}}, data, version)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("allocated"))
    assert_refused(path, "tensor 'a'|tensor data")


@pytest.mark.parametrize(
    "spans", [[(0, 4), (8, 12)], [(0, 4), (2, 6)], [(0, 4), (0, 4)], [(4, 8), (8, 12)], [(0, 4)]]
)
def test_gaps_and_overlaps(spans: list[tuple[int, int]], path: Path) -> None:
    head = {str(i): entry("F32", [1], *span) for i, span in enumerate(spans)}
    table = {
        name: {"dtype": "F32", "shape": [1], "sha256": hashlib.sha256(bytes(4)).hexdigest()} for name in head
    }
    forge(path, head, {"tensors": table}, bytes(12))
    assert_refused(path, "tensor")
    forge(path, {"0": entry("F32", [1], 0, 4)}, {"tensors": {"0": table["0"]}}, bytes(4))
    assert read(path)[0]["0"].item() == 0


def test_a_bool_is_0_or_1(path: Path) -> None:
    for content in (b"\x01\x00", b"\x02\x00", b"\x00\xff"):
        record = {"dtype": "BOOL", "shape": [2]}
        table = {"a": {**record, "sha256": hashlib.sha256(content).hexdigest()}}
        forge(path, {"a": {**record, "data_offsets": [0, 2]}}, {"tensors": table}, content)
        if max(content) > 1:
            assert_refused(path, "bytes 0 and 1", readers=(read,))
        else:
            assert read(path)[0]["a"].tolist() == [True, False]


def test_messages_stay_short_and_on_one_line(path: Path) -> None:
    name = "line\nbreak" * 10_000
    forge(path, {name: entry("F32", [1] * 60, 0, 1)}, {"tensors": {}}, b"")
    assert_refused(path)
