"""The manifest: what is in the file, as plain data, and the strict check of it on the way in.

version     of the format, 2; 1 is read as well
producer    who wrote it
recipe      the recipe, as Recipe.to_dict
parts       dtype of the floating-point parts
layers      name -> codec entry of each quantised weight
exponents   name -> exponent of those dense tensors that have one
ties        [[name, other owner, ...], ...]; the weight is stored under the first
dropped     modules that were left out
assets      name -> {bytes, codec}: files that travel inside, each a uint8 tensor `asset:<name>`, compressed by zlib or bz2,
            whichever is smaller (bz2 for a list of numbers such as RoBERTa's dictionary: 113 kB, not 136)
source      how to rebuild the model ({"builder": ...}), or null
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fairseq_qn.artifact import codec, header
from fairseq_qn.artifact.header import short
from fairseq_qn.errors import BlockSizeError, FormatError
from fairseq_qn.quant.blocks import check_block_size
from fairseq_qn.recipe import GRANULARITIES, MAX_BLOCK_SIZE, MAX_CENTROIDS

VERSION = header.VERSION
ASSET = "asset:"
MAX_ASSET_BYTES = 1 << 28  # a file inside the file; guards against a few bytes that unpack to gigabytes

_FIELDS = {
    "version": int, "producer": str, "recipe": dict, "parts": str, "layers": dict, "exponents": dict, "ties": list,
    "dropped": list, "assets": dict, "source": (dict, type(None)), "tensors": dict,
}  # fmt: skip


def check(manifest: Mapping[str, Any], path: str) -> None:
    """Raise FormatError unless the manifest is of this version and agrees with its own table of tensors."""
    if type(manifest.get("version")) is not int or not 1 <= manifest["version"] <= VERSION:
        raise FormatError(
            f"{path}: format version: expected 1 to {VERSION}, found {manifest.get('version')!r}; "
            "read it with the release of fairseq_qn that wrote it"
        )
    for key, kind in _FIELDS.items():
        if not isinstance(manifest.get(key, False), kind):
            raise FormatError(
                f"{path}: manifest.{key}: missing or of the wrong type; the file is damaged, fetch it again"
            )
    if manifest["parts"] not in codec.FLOATS:
        raise FormatError(f"{path}: manifest.parts: expected one of {list(codec.FLOATS)}, found {manifest['parts']!r}")
    for name, exponent in manifest["exponents"].items():
        if type(exponent) is not int or abs(exponent) > 1000:
            raise FormatError(f"{path}: {name}: exponent: expected a small whole number, found {exponent!r}")
    for name, entry in manifest["layers"].items():
        _check_layer(name, entry, manifest, path)
    _check_names(manifest, path)


def pack_asset(data: bytes) -> tuple[dict[str, Any], Tensor]:
    """(entry, uint8 [n]) of a file that travels inside."""
    packed = {"zlib": zlib.compress(data, 9), "bz2": bz2.compress(data, 9)}
    codec_name = min(packed, key=lambda name: len(packed[name]))
    tensor = torch.frombuffer(bytearray(packed[codec_name]), dtype=torch.uint8)
    return {"bytes": len(data), "codec": codec_name}, tensor


def read_assets(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str) -> dict[str, bytes]:
    """The files that travel inside. Raises FormatError for one that is not what its entry says."""
    assets = {}
    for name, entry in manifest["assets"].items():
        size, codec_name = (entry.get("bytes"), entry.get("codec", "zlib")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not 0 <= size <= MAX_ASSET_BYTES or ASSET + name not in tensors:
            raise FormatError(
                f"{path}: asset {name!r}: no such tensor, or no sensible size; the file is damaged, fetch it again"
            )
        if codec_name not in ("zlib", "bz2"):
            raise FormatError(f"{path}: asset {name!r}: codec: expected zlib or bz2, found {short(codec_name)}")
        unpacker = zlib.decompressobj() if codec_name == "zlib" else bz2.BZ2Decompressor()
        try:
            data = unpacker.decompress(tensors[ASSET + name].numpy().tobytes(), size + 1)
        except (zlib.error, OSError) as error:
            raise FormatError(f"{path}: asset {name!r}: cannot be unpacked: {error}") from None
        if len(data) != size:
            raise FormatError(
                f"{path}: asset {name!r}: expected {size} bytes, found {len(data)}{'+' if len(data) > size else ''}"
            )
        assets[name] = data
    return assets


def dense_names(manifest: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that are stored as they are."""
    parts = {
        f"{name}/{part}" for name, entry in manifest["layers"].items() for part in codec.layout(entry, torch.float32)
    }
    return [name for name in manifest["tensors"] if name not in parts and not name.startswith(ASSET)]


def _check_layer(name: str, entry: Any, manifest: Mapping[str, Any], path: str) -> None:
    damaged = f"{path}: layer {name!r}: {{}}; the file is damaged, fetch it again"
    if not isinstance(entry, dict) or not _sizes(entry.get("shape")) or len(entry["shape"]) < 2:
        raise FormatError(damaged.format("expected a shape of two or more sizes"))
    if entry.get("scheme") == "product":
        bounds = {"block_size": (1, MAX_BLOCK_SIZE), "n_centroids": (1, MAX_CENTROIDS), "exponent": (-1000, 1000)}
        padding = entry.get("padding_idx", -1)
        legal = padding is None or (type(padding) is int and 0 <= padding < entry["shape"][0])
        if "pad" in entry:
            bounds["pad"], legal = bounds["exponent"], legal and padding is not None
    elif entry.get("scheme") == "integer":
        bounds, legal = {"bits": (2, 8), "group_size": (1, MAX_CENTROIDS)}, entry.get("granularity") in GRANULARITIES
    else:
        raise FormatError(damaged.format(f"unknown scheme {entry.get('scheme')!r}"))
    if not legal or any(
        type(entry.get(k)) is not int or not low <= entry[k] <= high for k, (low, high) in bounds.items()
    ):
        raise FormatError(damaged.format("a field is missing or out of range"))
    try:
        if entry["scheme"] == "product":
            check_block_size(entry["shape"], entry["block_size"], name)
        wanted = codec.layout(entry, codec.FLOATS[manifest["parts"]])
    except BlockSizeError as error:
        raise FormatError(damaged.format(str(error))) from None
    for part, (dtype, shape) in wanted.items():
        found = manifest["tensors"].get(f"{name}/{part}")
        expected = [_dtype_name(dtype), list(shape)]
        if found is None or [found["dtype"], list(found["shape"])] != expected:
            shown = "none" if found is None else f"{found['dtype']} {found['shape']}"
            raise FormatError(damaged.format(f"{part}: expected {expected[0]} {expected[1]}, found {shown}"))


def _check_names(manifest: Mapping[str, Any], path: str) -> None:
    """Ties and dropped modules are lists of names, and each weight is stored once."""
    stored = {*manifest["layers"], *dense_names(manifest)}
    dropped, ties = manifest["dropped"], manifest["ties"]
    if not all(isinstance(name, str) and name for name in dropped):
        raise FormatError(f"{path}: dropped: expected names of modules, found {short(dropped)}; the file is damaged")
    twice = manifest["layers"].keys() & manifest["tensors"].keys()
    for names in ties:
        named = isinstance(names, list) and len(names) > 1 and all(isinstance(name, str) for name in names)
        if not named or stored & {*names} != {names[0]}:
            raise FormatError(
                f"{path}: ties: expected names of one weight, stored under the first, found {short(names)}; "
                "the file is damaged, fetch it again"
            )
    if twice:
        raise FormatError(f"{path}: {short(min(twice))}: stored dense and quantised; the file is damaged, fetch it again")


def _sizes(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)


def _dtype_name(dtype: torch.dtype) -> str:
    return {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}[dtype]
