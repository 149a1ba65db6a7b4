"""Laws of the container: what is written is read back, sizes are exact, and what does not fit is refused."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from by_hand import parts, same, small
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fairseq_qn.artifact import header
from fairseq_qn.artifact.container import predict_bytes, read, read_manifest, spec_of, write
from fairseq_qn.errors import EncodeError

DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64,
    torch.bool, torch.float64,
]  # fmt: skip
ROOT = Path(__file__).parents[2]
MANIFEST = {
    "version": 1,
    "recipe": {"rules": [{"layers": ".*", "p": 0.1}]},
    "words": ["naïve", '"quoted"', "\n\x00", "猫"],
}
GOLDEN = Path(__file__).parent / "data"


texts = st.text(st.characters(codec="utf-8"), max_size=8)
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
manifests = st.dictionaries(texts.filter(lambda key: key != "tensors"), plain, max_size=4)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any bytes (NaN payloads too) as a tensor of rank 0 to 4, empty ones included; now and then a
    transposed view.
    """
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    count = int(torch.Size(shape).numel())
    if dtype == torch.bool:
        tensor = torch.tensor(draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype)
    else:
        size = count * dtype.itemsize
        tensor = torch.tensor(list(draw(st.binary(min_size=size, max_size=size))), dtype=torch.uint8).view(
            dtype
        )
    tensor = tensor.reshape(shape)
    return tensor.transpose(0, -1) if tensor.dim() > 1 and draw(st.booleans()) else tensor


files = st.dictionaries(texts, tensors(), max_size=5)


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, header.Spec]:
    return {name: spec_of(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small, whole file."""
    path = tmp_path / "m.qn.safetensors"
    write(path, small(), MANIFEST)
    return path


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(files, manifests)
def test_round_trip_and_exact_prediction(
    tmp_path: Path, tensors: dict[str, torch.Tensor], manifest: dict
) -> None:
    path = tmp_path / "f"
    size = write(path, tensors, manifest)
    assert size == path.stat().st_size == predict_bytes(shapes_of(tensors), manifest)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back, told = read(path)
    assert back.keys() == tensors.keys() and all(same(back[name], tensors[name]) for name in tensors)
    assert {**manifest, "tensors": told["tensors"]} == told == read_manifest(path)
    assert {name: record["shape"] for name, record in told["tensors"].items()} == {
        name: list(tensor.shape) for name, tensor in tensors.items()
    }
    theirs = safetensors.torch.load_file(path)  # the library agrees with what was written
    assert theirs.keys() == tensors.keys() and all(same(theirs[name], tensors[name]) for name in tensors)


def test_the_size_is_the_librarys(path: Path) -> None:
    """The library, given the same tensors and metadata, writes as many bytes."""
    with safetensors.safe_open(path, "pt") as file:
        theirs = safetensors.torch.save(small(), file.metadata())
    assert len(theirs) == path.stat().st_size


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    """Neither the order of the keys nor the process counts."""
    backwards = dict(reversed(small().items())), dict(reversed(MANIFEST.items()))
    write(tmp_path / "a", small(), MANIFEST)
    write(tmp_path / "b", *backwards)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("version", [1, 2])
def test_golden_files(version: int, path: Path) -> None:
    """Files of each version that were written once, and are not to be written again, are read for ever."""
    golden = GOLDEN / f"version_{version}_container.qn.safetensors"
    told, (tensors, manifest) = parts(golden), read(golden)
    assert all(same(tensor, small()[name]) for name, tensor in tensors.items()) and len(tensors) == 4
    assert manifest == told[1] == {**MANIFEST, "tensors": told[1]["tensors"]} == read_manifest(golden)
    # byte for byte but for the manifest, whose deflated bytes are zlib's choice
    if version == header.VERSION:
        assert told == parts(path)


def test_tensors_are_aligned_and_independent(path: Path) -> None:
    tensors, _ = read(path)
    assert all(tensor.data_ptr() % tensor.dtype.itemsize == 0 for tensor in tensors.values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == len(tensors)
    before = path.read_bytes()
    for tensor in tensors.values():
        tensor.zero_()  # writable, and the file does not change
    assert path.read_bytes() == before
    offsets = sorted((entry["data_offsets"], entry["dtype"]) for entry in parts(path)[0].values())
    assert [dtype for _, dtype in offsets] == ["I64", "F16", "U8", "BOOL"]


def test_shared_strided_and_trained_tensors_are_written_in_full(tmp_path: Path) -> None:
    table = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    given_ = {
        "a": table,
        "b": table,
        "row": table[1],
        "t": table.T,
        "wide": torch.ones(1).expand(5),
        "c": table[:, ::2],
    }
    write(tmp_path / "f", given_, {})
    back, _ = read(tmp_path / "f")
    assert all(same(back[name], given_[name].detach()) for name in given_)


NOT_PLAIN = {
    "nan": {"a": float("nan")},
    "infinity": {"a": [float("-inf")]},
    "integer key": {"a": {1: 2}},
    "keys that become one": {1: 2, "1": 3},
    "tuple": {"a": (1, 2)},
    "set": {"a": {1, 2}},
    "bytes": {"a": b"bytes"},
    "tensor": {"a": torch.tensor(1)},
    "half a surrogate pair": {"a": "\ud800"},
    "more digits than Python reads": {"a": 10**5000},
    "reserved": {"tensors": {}},
    "list": [1],
    "list of pairs": [["a", 1]],
    "text": "text",
    "nothing": None,
}


@pytest.mark.parametrize("manifest", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_manifests_that_are_not_plain_are_refused(manifest: Any, tmp_path: Path) -> None:
    for call in (lambda: write(tmp_path / "f", small(), manifest), lambda: predict_bytes({}, manifest)):
        with pytest.raises(EncodeError, match="manifest: expected") as error:
            call()
        assert "\n" not in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_manifest_that_holds_itself_is_refused(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for manifest in (loop, {"deep": deep}):
        with pytest.raises(EncodeError, match="manifest"):
            write(tmp_path / "f", {}, manifest)


MISFITS = {
    "reserved name": {"__metadata__": torch.ones(1)},
    "name that is no text": {1: torch.ones(1)},
    "name beyond UTF-8": {"\udfff": torch.ones(1)},
    "dtype": {"a": torch.ones(1, dtype=torch.complex64)},
    "meta": {"a": torch.ones(2, device="meta")},
    "sparse": {"a": torch.eye(2).to_sparse()},
    "no tensor": {"a": [1]},
    "rank": {"a": torch.ones([1] * 65)},
}


@pytest.mark.parametrize("tensors", MISFITS.values(), ids=MISFITS)
def test_tensors_that_do_not_fit_are_refused(tensors: dict[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(EncodeError, match="expected"):
        write(tmp_path / "f", tensors, {})
    assert os.listdir(tmp_path) == []


def test_a_header_beyond_the_cap_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    for limit in ("MAX_HEADER_BYTES", "MAX_MANIFEST_BYTES"):
        text = secrets.token_hex(500) if limit == "MAX_HEADER_BYTES" else "x" * 500
        with monkeypatch.context() as patch:
            patch.setattr(header, limit, 500)
            with pytest.raises(EncodeError, match="at most 500 bytes"):
                write(path, small(), {"text": text})
            with pytest.raises(EncodeError, match="at most 500 bytes"):
                predict_bytes({}, {"text": text})
    assert path.read_bytes() == before


MEMORY = """
    import pathlib, resource, sys
    from fairseq_qn.artifact import container
    container.read(sys.argv[1])  # imports and threads are there now
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, [pages * resource.getpagesize() + int(sys.argv[3])] * 2)
    container.read(sys.argv[2])
"""


def test_reading_takes_no_more_memory_than_the_file(tmp_path: Path) -> None:
    write(tmp_path / "small", small(), {})
    size = write(tmp_path / "large", {str(i): torch.ones(3_000_000) for i in range(8)}, {})
    for share, enough in [(1.1, True), (0.9, False)]:  # the second shows that the limit bites
        script = [
            textwrap.dedent(MEMORY),
            str(tmp_path / "small"),
            str(tmp_path / "large"),
            str(int(share * size)),
        ]
        done = subprocess.run([sys.executable, "-c", *script], capture_output=True, text=True, cwd=ROOT)
        assert (done.returncode == 0) == enough, done.stderr


def test_the_manifest_is_read_without_the_data(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("data were read"))
    assert read_manifest(path)["words"] == MANIFEST["words"]
