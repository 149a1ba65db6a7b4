"""The header of the small file, as bytes: what `container` writes before the tensors, and checks before it
reads them.

    bytes 0 .. 8        N, the length of the rest, as a little-endian uint64
    bytes 8 .. 8 + N    canonical JSON, filled up with spaces to a multiple of 8
                        {"__metadata__": {"digests": "...", "format": "fairseq_qn", "header_sha256": "...",
                                          "manifest": "...", "version": "2"},
                         "name": {"data_offsets": [begin, end], "dtype": "F16", "shape": [...]}, ...}

`manifest` is JSON text, deflated (zlib) and written in base 85; `digests` is the sha256 of each tensor, 32
bytes each, by name, in base 85, which needs no escapes in JSON. In version 1 the manifest was plain text
with a table of dtypes, shapes and digests in hex: three quarters of the header, 60 of 99 kB for a
RoBERTa-base, where 12 are enough. It is still read.

`header_sha256` is the sha256 of bytes 0 .. 8 + N with its own 64 digits written as zeros. So each byte of
the file is under one digest. Digests show damage, not malice: each claim of a header is also checked against
the size of the file, a manifest stops inflating at MAX_MANIFEST_BYTES, and MAX_TENSORS and the bounds of
strict_json say what Python may be made to do, so that no claim alone can make a reader take memory or time:
a header is read in a second and 100 MB, whatever it says.

The header is laid out here, and not by the safetensors library, because the library (0.8.0) writes metadata
in random order and cannot say beforehand how large a file will be. The library reads these files, and a test
compares.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import zlib
from base64 import b85decode, b85encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from fairseq_qn.artifact import strict_json
from fairseq_qn.errors import EncodeError, FormatError, short

FORMAT = "fairseq_qn"
VERSION = 2
MAX_HEADER_BYTES = 1 << 21  # a RoBERTa-base has 47 kB
MAX_MANIFEST_BYTES = 1 << 21  # of JSON; a RoBERTa-base has 14 kB
MAX_TENSORS = 10_000  # a RoBERTa-base has 264
MAX_RANK = 64  # numpy's limit

DTYPES = {  # by the file's names: torch's, bytes
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
NAMES = {dtype: name for name, (dtype, _) in DTYPES.items()}
ITEM_BYTES = dict(DTYPES.values())

Spec = tuple[str, tuple[int, ...]]  # torch's name of the dtype, and the shape
PathLike = str | os.PathLike[str]

_BLANK = "0" * 64
_DIGEST_BYTES = 32
_FIELDS = {  # version -> the metadata's fields
    "1": {"format", "header_sha256", "manifest"},
    "2": {"digests", "format", "header_sha256", "manifest", "version"},
}
# Inside a JSON string these quotes would be escaped, so the key itself is all that can match.
_DIGEST = re.compile(rb'(?<="header_sha256":")[0-9a-f]{64}(?=")')


def nbytes(spec: Spec) -> int:
    """Bytes that a tensor of this dtype and shape takes."""
    dtype, shape = spec
    return math.prod(shape) * ITEM_BYTES[dtype]


def record_bytes(record: Mapping[str, Any]) -> int:
    """Bytes of a tensor of the manifest's table."""
    return nbytes((DTYPES[record["dtype"]][0], tuple(record["shape"])))


def ordered(specs: Mapping[str, Spec]) -> dict[str, Spec]:
    """The specs in file order: by falling item size, so that each tensor is aligned to its items, then by
    name.

    Raises: EncodeError for a name, dtype or shape that the file cannot hold.
    """
    if len(specs) > MAX_TENSORS:
        raise EncodeError(
            f"expected at most {MAX_TENSORS} tensors, found {len(specs)}; the file holds no more"
        )
    for name, (dtype, shape) in specs.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise EncodeError(f"tensor {name!r}: expected a name other than '__metadata__'; rename it")
        if dtype not in NAMES:
            raise EncodeError(
                f"tensor {name!r}: expected one of {', '.join(DTYPES)}, found {dtype}; convert it first"
            )
        if not is_shape(list(shape)):
            raise EncodeError(
                f"tensor {name!r}: expected up to {MAX_RANK} sizes >= 0, found {short(shape)}; reshape it"
            )
    in_order = sorted(specs.items(), key=lambda item: (-ITEM_BYTES[item[1][0]], item[0]))
    return {name: (dtype, tuple(shape)) for name, (dtype, shape) in in_order}


def encode(specs: Mapping[str, Spec], manifest: Mapping[str, Any], digests: Mapping[str, bytes]) -> bytes:
    """Bytes 0 .. 8 + N for tensors that follow in the order of `specs`.

    `digests` are the sha256 of the tensors by name; an absent one is written as zeros, so they never change
    the length.

    Raises: EncodeError for a manifest that is not plain JSON data, or is too large.
    """
    entries, begin = {}, 0
    for name, spec in specs.items():
        entries[name] = {**_record(spec), "data_offsets": [begin, begin := begin + nbytes(spec)]}
    raw_digests = b"".join(digests.get(name, bytes(_DIGEST_BYTES)) for name in sorted(specs))
    try:
        text = strict_json.dumps(_plain(manifest)).encode()
        meta = {
            "digests": b85encode(raw_digests).decode(), "format": FORMAT, "header_sha256": _BLANK,
            "manifest": b85encode(zlib.compress(text, 9)).decode(), "version": str(VERSION),
        }  # fmt: skip
        body = strict_json.dumps({"__metadata__": meta, **entries}).encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        found = repr(error.object[error.start])
        raise EncodeError(
            f"manifest: expected text and names that UTF-8 can write, found {found}; replace it"
        ) from None
    body += b" " * (-len(body) % 8)
    for size, limit in ((len(text), MAX_MANIFEST_BYTES), (len(body), MAX_HEADER_BYTES)):
        if size > limit:
            raise EncodeError(
                f"manifest: expected at most {limit} bytes, found {size}; store large data as tensors"
            )
    raw = len(body).to_bytes(8, "little") + body
    return _DIGEST.sub(hashlib.sha256(raw).hexdigest().encode(), raw)


def decode(file: BinaryIO, path: PathLike) -> tuple[dict[str, Any], dict[str, Spec]]:
    """Manifest and specs in file order, checked against one another and the file's size; leaves `file` at
    the data.

    To the manifest comes `tensors`: {name: {dtype, shape, sha256}}, as version 1 had it in the file.
    Raises: FormatError.
    """
    raw = _verified_bytes(file, path)
    with _named(path, "the tensors and metadata of a fairseq_qn file"):
        header = strict_json.loads(raw[8:].decode())
        meta = header.pop("__metadata__")
        if meta["format"] != FORMAT:
            raise ValueError(f"format {short(meta['format'])}")
        version = meta.get("version", "1")
    if not isinstance(version, str) or version not in _FIELDS:
        todo = "read it with the release of fairseq_qn that wrote it, or a newer one"
        raise bad(path, "format version", f"one of {', '.join(_FIELDS)}", short(version), todo)
    specs = _check_entries(header, path, os.fstat(file.fileno()).st_size - len(raw))
    with _named(path, "the metadata and manifest of a fairseq_qn file"):
        if meta.keys() != _FIELDS[version]:
            raise ValueError(f"metadata {short(sorted(meta))}")
        text = meta["manifest"] if version == "1" else _inflated(b85decode(meta["manifest"])).decode()
        manifest = {**strict_json.loads(text)}
        table = (
            dict(manifest["tensors"].items())
            if version == "1"
            else _table(specs, b85decode(meta["digests"]))
        )
        if version != "1" and "tensors" in manifest:
            raise ValueError("a table of tensors within the manifest")
    _check_table(table, specs, path)
    return {**manifest, "tensors": table}, specs


def bad(path: PathLike, what: str, expected: str, found: str, todo: str = "") -> FormatError:
    """A FormatError of one line. todo: what the user can do, if not to fetch or save the file again."""
    todo = todo or "damaged, or not of fairseq_qn: fetch or save it again"
    return FormatError(f"{os.fspath(path)}: {what}: expected {expected}, found {found}; {todo}")


def _verified_bytes(file: BinaryIO, path: PathLike) -> bytes:
    """Bytes 0 .. 8 + N, whose digest is right."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length, limit = int.from_bytes(prefix, "little"), min(MAX_HEADER_BYTES, size - 8)
    if len(prefix) < 8 or length > limit:
        if prefix.startswith((b"PK\x03\x04", b"\x80")):
            todo = f"make one of it: fairseq-qn compress {os.path.basename(path)} -o FILE.qn.safetensors"
            raise bad(path, "kind", "a small file", "a pickle or zip, as torch.save writes", todo)
        found = f"{length} in a file of {size} bytes"
        raise bad(path, "header length", f"at most {max(limit, 0)} bytes", found)
    raw = prefix + file.read(length)
    digests = _DIGEST.findall(raw)
    if len(raw) < 8 + length or not digests:
        raise bad(path, "header", "a header_sha256", "none")
    actual = hashlib.sha256(_DIGEST.sub(_BLANK.encode(), raw)).hexdigest()
    if actual != digests[0].decode():
        raise bad(path, "header", f"sha256 {digests[0].decode()[:16]}...", f"{actual[:16]}...")
    return raw


def _check_entries(header: dict[str, Any], path: PathLike, data_bytes: int) -> dict[str, Spec]:
    """Specs in file order, from entries that cover the `data_bytes` after the header with no gap or
    overlap.
    """
    spans = []
    if len(header) > MAX_TENSORS:
        raise bad(path, "tensors", f"at most {MAX_TENSORS}", str(len(header)))
    for name, entry in header.items():
        if not _is_entry(entry):
            raise bad(path, f"tensor {short(name)}", "a known dtype, a shape and two offsets", short(entry))
        spans.append((entry["data_offsets"], name, (DTYPES[entry["dtype"]][0], tuple(entry["shape"]))))
    end, specs = 0, {}
    for offsets, name, spec in sorted(spans, key=lambda span: span[:2]):
        expected = [end, end := end + nbytes(spec)]
        if offsets != expected:
            raise bad(
                path, f"tensor {short(name)}", f"bytes {expected} for {short(_record(spec))}", short(offsets)
            )
        specs[name] = spec
    if end != data_bytes:
        raise bad(path, "tensor data", f"{end} bytes", f"{data_bytes}: the file is cut short or has a tail")
    return specs


def _inflated(data: bytes) -> bytes:
    """What zlib.compress was given, unless it is too large, cut short or has a tail. Raises ValueError."""
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, MAX_MANIFEST_BYTES + 1)
    except zlib.error as error:
        raise ValueError(f"a manifest that cannot be inflated: {error}") from None
    if len(text) > MAX_MANIFEST_BYTES or not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"a manifest over {MAX_MANIFEST_BYTES} bytes, cut short or with a tail")
    return text


def _table(specs: Mapping[str, Spec], digests: bytes) -> dict[str, Any]:
    """{name: {dtype, shape, sha256}} from the digests of the tensors by name."""
    if len(digests) != _DIGEST_BYTES * len(specs):
        raise ValueError(f"{len(digests)} bytes of digests for {len(specs)} tensors")
    hexes = (digests[i : i + _DIGEST_BYTES].hex() for i in range(0, len(digests), _DIGEST_BYTES))
    return {
        name: {**_record(specs[name]), "sha256": sha256}
        for name, sha256 in zip(sorted(specs), hexes, strict=True)
    }


@contextmanager
def _named(path: PathLike, expected: str) -> Iterator[None]:
    """Whatever damaged JSON makes Python raise, as a FormatError."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise bad(path, "header", expected, short(f"{type(error).__name__}: {error}")) from None


def _check_table(table: dict[str, Any], specs: Mapping[str, Spec], path: PathLike) -> None:
    """The manifest's table and the tensors that are there say the same."""
    missing, extra = table.keys() - specs.keys(), specs.keys() - table.keys()
    for names, what in ((missing, "missing"), (extra, "extra")):
        if names:
            found = f"{len(names)} {what}, first {short(min(names))}"
            raise bad(path, "tensors", f"the {len(table)} of the manifest", found)
    for name, spec in specs.items():
        record = table[name]
        if not isinstance(record, dict) or record != {**_record(spec), "sha256": record.get("sha256")}:
            raise bad(path, f"tensor {short(name)}", f"the manifest's {short(record)}", short(_record(spec)))


def _record(spec: Spec) -> dict[str, Any]:
    dtype, shape = spec
    return {"dtype": NAMES[dtype], "shape": list(shape)}


def _is_entry(entry: Any) -> bool:
    if type(entry) is not dict or entry.keys() != {"dtype", "shape", "data_offsets"}:
        return False
    known = type(entry["dtype"]) is str and entry["dtype"] in DTYPES
    return known and is_shape(entry["shape"]) and _are_sizes(entry["data_offsets"])


def is_shape(shape: Any) -> bool:
    """Sizes whose product, without the zeros, torch can count in bytes with int64."""
    return (
        _are_sizes(shape) and len(shape) <= MAX_RANK and math.prod(size for size in shape if size) < 1 << 60
    )


def _are_sizes(sizes: Any) -> bool:
    return type(sizes) is list and all(type(size) is int and size >= 0 for size in sizes)


def _plain(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the manifest by way of JSON; what reading would not give back equal is refused."""
    try:
        copy = strict_json.loads(strict_json.dumps(manifest))
    except (TypeError, ValueError, RecursionError) as error:
        raise EncodeError(f"manifest: expected plain JSON data, without NaN or infinity; {error}") from None
    if type(copy) is not dict or "tensors" in copy:
        raise EncodeError(
            "manifest: expected a dict that has no key 'tensors', which this format adds; rename the key"
        )
    if copy != manifest:
        raise EncodeError("manifest: expected text as keys and lists, not tuples; convert them first")
    return copy
