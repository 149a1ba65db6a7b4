"""The BPE and the tokenizer that travel inside a small file, with their options and files."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fairseq_qn.artifact import manifest
from fairseq_qn.errors import FormatError, UnsupportedError, short
from fairseq_qn.models.options import BPE_FILES, BPES, TOKENIZERS, one_of, take

# what the libraries do not check: one ends the process at other lines, the other reads on past them
_CODES = {
    "fastbpe": re.compile(r"(\S+) (\S+) \d{1,9}"),
    "subword_nmt": re.compile(r"(?!#version)(\S+) (\S+)|#version: \d{1,3}(\.\d{1,3})*"),
}


def carry_bpe(
    name: str, files: Sequence[str | Path], options: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(source, assets) for `save`, so that a BPE and its model files travel inside the file.

    files are told apart by their endings. Raises UnsupportedError for a BPE or an option that is not known
    here, or a file too few or many.
    """
    if name not in BPE_FILES:
        raise UnsupportedError(f"--bpe: expected one of {sorted(BPE_FILES)}, found {name!r}")
    unknown = sorted({*(options or {})} - {*BPES[name]})
    if unknown:
        raise UnsupportedError(
            f"--bpe-option: {name} takes {sorted(BPES[name]) or 'none'}, found {unknown[0]!r}"
        )
    config: dict[str, Any] = {
        "_name": name,
        **take(BPES[name], options or {}, "--bpe-option", UnsupportedError),
    }
    assets, left = {}, [Path(file) for file in files]
    for option, ending in BPE_FILES[name].items():
        found = [file for file in left if file.name.endswith(ending)]
        if len(found) != 1:
            raise UnsupportedError(
                f"--bpe {name}: expected one file for {option} (*{ending}), found {[str(f) for f in found]}"
            )
        left.remove(found[0])
        assets[found[0].name] = found[0].read_bytes()
        config[option] = manifest.ASSET + found[0].name
    if left:
        raise UnsupportedError(f"--bpe {name}: takes no file {str(left[0])!r}")
    return {"bpe": config}, assets


def carried_text(state: Mapping[str, Any], where: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(source, assets) for `save` of the BPE that an imported checkpoint carries; ({}, {}) of any other.

    Raises FormatError for any that `save` could not have written.
    """
    text = state.get("qn_text")
    if text is None:
        return {}, {}
    files = text.get("files") if isinstance(text, Mapping) else None
    if not isinstance(files, Mapping) or any(
        type(part) is not str for item in files.items() for part in item
    ):
        raise FormatError(f"{where}: qn_text: expected a BPE and the text of its files, found {short(text)}")
    found = checked_text(text, files)["bpe"]
    if found is None:
        return {}, {}
    names = {option: found[option] for option in BPE_FILES[found["_name"]]}
    config = {**found, **{option: manifest.ASSET + name for option, name in names.items()}}
    return {"bpe": config}, {name: files[name].encode() for name in names.values()}


def checked_text(source: Mapping[str, Any], assets: Mapping[str, Any]) -> dict[str, dict[str, Any] | None]:
    """{"bpe": options or None, "tokenizer": options or None} of a file's source; a file's option becomes the
    name of its asset.

    Raises FormatError for any but the known ones, for an option that the table lacks, and for a file that is
    not inside.
    """
    result: dict[str, dict[str, Any] | None] = {}
    for part, known in (("bpe", BPES), ("tokenizer", TOKENIZERS)):
        given = source.get(part)
        result[part] = None
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise FormatError(f"source.{part}: expected options by name, found {short(given)}")
        name = one_of(known, given.get("_name"), f"source.{part}._name")
        result[part] = {"_name": name, **take(known[name], given, f"source.{part}")}
        for option in BPE_FILES[name] if part == "bpe" else ():
            value = given.get(option)
            asset = value.removeprefix(manifest.ASSET) if type(value) is str else ""
            if (
                not asset
                or asset == value
                or asset not in assets
                or re.search(r"[/\\:\0]", asset)
                or asset in (".", "..")
            ):
                raise FormatError(
                    f"source.bpe.{option}: expected the name of a file inside, asset:NAME, found "
                    f"{short(value)}"
                )
            result[part][option] = asset
    return result


@contextmanager
def unpacked(
    text: Mapping[str, dict[str, Any] | None], assets: Mapping[str, bytes]
) -> Iterator[dict[str, Any]]:
    """What checked_text gave, with paths for assets, which lie there, under names of ours, until the end."""
    with tempfile.TemporaryDirectory() as folder:
        result = dict(text)
        if text["bpe"] is not None:
            result["bpe"] = dict(text["bpe"])
            name = text["bpe"]["_name"]
            for option in BPE_FILES[name]:
                data = assets[text["bpe"][option]]
                _check_codes(name, data)
                path = Path(folder) / option
                path.write_bytes(data)
                result["bpe"][option] = str(path)
        yield result


class Guarded:
    """A BPE whose model came out of a file: whatever it raises is a FormatError."""

    def __init__(self, bpe: Any, path: str | Path) -> None:
        self.inner, self.path = bpe, path

    def __getattr__(self, name: str) -> Any:
        if name in ("inner", "path"):  # not set yet, in a copy
            raise AttributeError(name)
        return getattr(self.inner, name)

    def encode(self, x: str) -> str:
        """Text -> pieces, joined by spaces."""
        return self._ask(self.inner.encode, x)

    def decode(self, x: str) -> str:
        """Pieces, joined by spaces -> text."""
        return self._ask(self.inner.decode, x)

    def _ask(self, verb: Any, x: str) -> str:
        try:
            return verb(x)
        except Exception as error:
            if not isinstance(x, str):
                raise
            what = f"bpe: cannot {verb.__name__} {short(x)}: {type(error).__name__}"
            raise FormatError(f"{self.path}: {what}; save the file with the model's own BPE") from error


def _check_codes(name: str, data: bytes) -> None:
    """Raise FormatError for a file of BPE codes that makes its library end the process."""
    if name not in _CODES:
        return
    try:
        lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise FormatError(
            f"source.bpe.bpe_codes: expected UTF-8 text, found {error.reason} at byte {error.start}"
        ) from None
    matches = [_CODES[name].fullmatch(line) for line in (lines if lines[-1] else lines[:-1])]
    if None in matches:
        raise FormatError(
            f"source.bpe.bpe_codes: expected lines of two pieces, found {short(lines[matches.index(None)])}"
        )
    if name == "fastbpe" and len({f"{m[1]}{m[2]}" for m in matches}) < len(matches):
        raise FormatError("source.bpe.bpe_codes: expected each piece to be made once, found one twice")
