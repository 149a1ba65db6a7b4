"""The manifest: what is in the file, as plain data, and the strict check of it on the way in.

version     of the format, 1 to 3: see `version_of`
producer    who wrote it
recipe      the recipe, as Recipe.to_dict
parts       dtype of the floating-point parts
layers      name -> entry of each quantised weight: what its scheme says of it
exponents   name -> exponent of those dense tensors that have one
ties        [[name, other owner, ...], ...]; the weight is stored under the first
dropped     modules that were left out
activations name of a module -> entry of what its input goes through; absent where there are none
modules     kind -> names of the modules of that kind,
where the model is not rebuilt from `source`; files of before have none
assets      name -> {bytes, codec}: files that travel inside, each a uint8 tensor `asset:<name>`,
compressed by zlib or bz2,
            whichever is smaller (bz2 for a list of numbers such as RoBERTa's dictionary: 113 kB, not 136)
source      how to rebuild the model ({"builder": ...}), or null
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from fairseq_qn.artifact import header, streams
from fairseq_qn.errors import FormatError, short
from fairseq_qn.quant.half import FLOATS
from fairseq_qn.schemes import SCHEMES
from fairseq_qn.schemes.activation import ACTIVATIONS

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 3  # the newest that is read; what is written says `version_of`
ASSET = "asset:"
# Guards against a few bytes that become gigabytes: at most BASE + TIMES * what is stored.
ASSETS_BASE, ASSETS_TIMES = 1 << 25, 8  # bytes of all files that travel inside, unpacked
# bytes of all weights, decoded to fp32; blocks of 16 by 256 are 64 times theirs
DECODED_BASE, DECODED_TIMES = 1 << 28, 128
# The same where they are decoded at once: fresh memory comes at 1 GB a second, and a file is to open within
# 1 s and 1 s for every 50 MB of it, and within 100 MB and twice what it decodes to.
DENSE_BASE, DENSE_TIMES = 1_000_000_000, 20

_FIELDS: dict[str, type | tuple[type, ...]] = {
    "version": int, "producer": str, "recipe": dict, "parts": str, "layers": dict, "exponents": dict,
    "ties": list,
    "dropped": list, "assets": dict, "source": (dict, type(None)), "tensors": dict,
}  # fmt: skip


def check(manifest: Mapping[str, Any], path: str) -> None:
    """Raise FormatError unless the manifest is of this version and agrees with its own table of tensors."""
    version = manifest.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise FormatError(
            f"{path}: format version: expected 1 to {VERSION}, found {short(version)}; "
            "read it with the release of fairseq_qn that wrote it"
        )
    for key, kind in _FIELDS.items():
        if not isinstance(manifest.get(key, False), kind):
            raise FormatError(
                f"{path}: manifest.{key}: missing or of the wrong type; the file is damaged, fetch it again"
            )
    if manifest["parts"] not in FLOATS:
        raise FormatError(
            f"{path}: manifest.parts: expected one of {[*FLOATS]}, found {short(manifest['parts'])}"
        )
    kinds = manifest.get("modules", {})
    names = [name for of_kind in kinds.values() for name in of_kind] if _are_lists(kinds) else [None]
    if not all(isinstance(name, str) for name in names):
        raise FormatError(
            f"{path}: modules: expected names by kind, found {short(kinds)}; the file is damaged, fetch it "
            "again"
        )
    for name, exponent in manifest["exponents"].items():
        if type(exponent) is not int or abs(exponent) > 1000:
            raise FormatError(
                f"{path}: {name}: exponent: expected a small whole number, found {short(exponent)}"
            )
    for name, entry in manifest["layers"].items():
        if problem := _problem(name, entry, manifest):
            raise FormatError(f"{path}: layer {name!r}: {problem}; the file is damaged, fetch it again")
    for name, entry in _activations(manifest, path).items():
        own = next((known for key, known in ACTIVATIONS.items() if key == entry.get("scheme")), None)
        problem = f"unknown scheme {short(entry.get('scheme'))}" if own is None else own.check_entry(entry)
        if problem:
            raise FormatError(
                f"{path}: activations of {name!r}: {problem}; the file is damaged, fetch it again"
            )
    _check_names(manifest, path)
    if version < VERSION == version_of(manifest):
        raise FormatError(f"{path}: format version: expected {VERSION} of what is in it, found {version}")
    stored = sum(map(header.record_bytes, manifest["tensors"].values()))
    if problem := layers_excess(manifest, stored):
        raise FormatError(f"{path}: {problem}; the file is damaged, fetch it again")


def version_of(content: Mapping[str, Any]) -> int:
    """The oldest version whose readers understand this manifest: a reader of version 2 would pass over what
    3 added.
    """
    new = {"streams", "transposed", "symmetric", "min_bits", "scale"}
    added = "activations" in content or any(new & entry.keys() for entry in content["layers"].values())
    return VERSION if added else 2


def layers_excess(manifest: Mapping[str, Any], stored: int) -> str | None:
    """What is wrong if the layers decode to more memory than a file with `stored` bytes of tensors may ask
    for, or None.
    """
    return _excess("layers in fp32", _decoded(manifest), DECODED_BASE + DECODED_TIMES * stored, stored)


def dense_excess(manifest: Mapping[str, Any]) -> str | None:
    """The same of layers that are all decoded as the file is opened, for a manifest that was checked."""
    stored = sum(map(header.record_bytes, manifest["tensors"].values()))
    return _excess("layers in fp32", _decoded(manifest), DENSE_BASE + DENSE_TIMES * stored, stored)


def _decoded(manifest: Mapping[str, Any]) -> int:
    return sum(4 * prod(entry["shape"]) for entry in manifest["layers"].values())


def assets_excess(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """The same of the files that travel inside, unpacked."""
    stored = sum(tensors[ASSET + name].numel() for name in manifest["assets"])
    unpacked = sum(entry["bytes"] for entry in manifest["assets"].values())
    return _excess("files inside, unpacked", unpacked, ASSETS_BASE + ASSETS_TIMES * stored, stored)


def _excess(what: str, found: int, most: int, stored: int) -> str | None:
    return f"{what}: expected at most {most} bytes out of {stored}, found {found}" if found > most else None


def pack_asset(data: bytes) -> tuple[dict[str, Any], Tensor]:
    """(entry, uint8 [n]) of a file that travels inside."""
    packed = {"zlib": zlib.compress(data, 9), "bz2": bz2.compress(data, 9)}
    codec_name = min(packed, key=lambda name: len(packed[name]))
    tensor = torch.frombuffer(bytearray(packed[codec_name]), dtype=torch.uint8)
    return {"bytes": len(data), "codec": codec_name}, tensor


class Assets(Mapping[str, bytes]):
    """The files that travel inside, by name, each unpacked when it is asked for.

    Raises FormatError for one that is not what its entry says, and at once for more than a file of this size
    may unpack to.
    """

    def __init__(self, manifest: Mapping[str, Any], tensors: Mapping[str, Tensor], path: str) -> None:
        self._entries, self._tensors, self._path = manifest["assets"], tensors, path
        for name, entry in self._entries.items():
            size, codec_name = (
                (entry.get("bytes"), entry.get("codec", "zlib")) if isinstance(entry, dict) else (None, None)
            )
            if (
                type(size) is not int
                or size < 0
                or ASSET + name not in tensors
                or tensors[ASSET + name].dtype != torch.uint8
            ):
                raise self._bad(
                    name, "no such tensor, or no sensible size; the file is damaged, fetch it again"
                )
            if codec_name not in ("zlib", "bz2"):
                raise self._bad(name, f"codec: expected zlib or bz2, found {short(codec_name)}")
        if problem := assets_excess(manifest, tensors):
            raise FormatError(f"{path}: {problem}; the file is damaged, fetch it again")

    def __getitem__(self, name: str) -> bytes:
        size, codec_name = self._entries[name]["bytes"], self._entries[name].get("codec", "zlib")
        unpacker = zlib.decompressobj() if codec_name == "zlib" else bz2.BZ2Decompressor()
        try:
            data = unpacker.decompress(self._tensors[ASSET + name].numpy().tobytes(), size + 1)
        except (zlib.error, OSError) as error:
            raise self._bad(
                name, f"cannot be unpacked: {error}; the file is damaged, fetch it again"
            ) from None
        if len(data) != size:
            more = "+" if len(data) > size else ""
            raise self._bad(
                name, f"expected {size} bytes, found {len(data)}{more}; the file is damaged, fetch it again"
            )
        return data

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _bad(self, name: str, what: str) -> FormatError:
        return FormatError(f"{self._path}: asset {name!r}: {what}")


def dense_names(manifest: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that are stored as they are."""
    parts = {
        f"{name}/{part}" for name, entry in manifest["layers"].items() for part in streams.layout(entry)
    }
    return [name for name in manifest["tensors"] if name not in parts and not name.startswith(ASSET)]


def transposed(entry: Mapping[str, Any]) -> bool:
    """Whether the model has a layer's weight the other way round, [in, out], than it is stored."""
    return entry.get("transposed") is True


def _problem(name: str, entry: Any, manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with a layer's entry, or None."""
    if not isinstance(entry, dict) or not _is_shape(entry.get("shape")):
        return "expected a shape of two or more sizes"
    scheme = next((own for name, own in SCHEMES.items() if name == entry.get("scheme")), None)
    if scheme is None:
        return f"unknown scheme {short(entry.get('scheme'))}"
    turned = entry.get("transposed", False)
    if type(turned) is not bool or (turned and len(entry["shape"]) != 2):
        return f"transposed: expected true of a matrix, or false, found {short(turned)}"
    if problem := scheme.check_entry(entry) or streams.check(entry):
        return problem
    wanted = streams.layout(entry, manifest["parts"])
    for part, (dtype, shape) in wanted.items():
        found, expected = manifest["tensors"].get(f"{name}/{part}"), [header.NAMES[dtype], list(shape)]
        if found is None or [found["dtype"], list(found["shape"])] != expected:
            shown = "none" if found is None else f"{found['dtype']} {found['shape']}"
            return f"{part}: expected {expected[0]} {expected[1]}, found {shown}"
    return None


def _activations(manifest: Mapping[str, Any], path: str) -> dict[str, dict[str, Any]]:
    found = manifest.get("activations", {})
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        todo = "the file is damaged, fetch it again"
        raise FormatError(f"{path}: activations: expected entries by name, found {short(found)}; {todo}")
    return found


def _check_names(manifest: Mapping[str, Any], path: str) -> None:
    """Ties and dropped modules are lists of names, each once, and each weight is stored once."""
    stored = {*manifest["layers"], *dense_names(manifest)}
    dropped = manifest["dropped"]
    seen: set[str] = set()
    if not all(isinstance(name, str) and name for name in dropped) or len({*dropped}) < len(dropped):
        raise FormatError(
            f"{path}: dropped: expected names of modules, each once, found {short(dropped)}; the file is "
            "damaged"
        )
    for names in manifest["ties"]:
        named = isinstance(names, list) and len(names) > 1 and all(isinstance(name, str) for name in names)
        once = named and len({*names}) == len(names) and seen.isdisjoint(names)
        if not once or names[0] not in stored or not stored.isdisjoint(names[1:]):
            raise FormatError(
                f"{path}: ties: expected names of one weight, stored under the first, each once, found "
                f"{short(names)}; "
                "the file is damaged, fetch it again"
            )
        seen.update(names)
    if twice := manifest["layers"].keys() & manifest["tensors"].keys():
        raise FormatError(
            f"{path}: {short(min(twice))}: stored dense and quantised; the file is damaged, fetch it again"
        )


def _is_shape(shape: Any) -> bool:
    return header.is_shape(shape) and len(shape) > 1 and min(shape) > 0


def _are_lists(data: Any) -> bool:
    return isinstance(data, dict) and all(isinstance(value, list) for value in data.values())
