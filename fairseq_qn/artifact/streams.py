"""Packed parts of a layer whose size a coder chose: what an entry says of them, and the coders there are.

An entry may carry `streams`: part -> {"coder": name, "bytes": n}. Such a part lies in the file as uint8 [n],
and what the coder makes of it is the part that the scheme's layout asks for, no more and no less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

import torch

from fairseq_qn.artifact.ans import Ans
from fairseq_qn.errors import FormatError, short
from fairseq_qn.schemes import SCHEMES
from fairseq_qn.schemes.base import Entry, Specs

if TYPE_CHECKING:
    from torch import Tensor


class Coder(Protocol):
    """A lossless code of packed codes of so many bits. Its name is that of one version of it."""

    def encode(self, raw: Tensor, bits: int) -> Tensor:
        """uint8 [n] -> uint8 [m]. Raises UnsupportedError where a library is missing."""

    def decode(self, coded: Tensor, size: int, bits: int) -> Tensor:
        """uint8 [m] -> uint8 [size]. Raises FormatError."""


CODERS: dict[str, Coder] = {"ans": Ans()}


def layout(entry: Entry, dtype: str = "float32") -> Specs:
    """part -> (dtype, shape) of what lies in the file, of an entry that was checked."""
    specs = SCHEMES[entry["scheme"]].layout(entry, dtype)
    coded = {part: ("uint8", (stream["bytes"],)) for part, stream in entry.get("streams", {}).items()}
    return {**specs, **coded}


def check(entry: Entry) -> str | None:
    """What is wrong with the `streams` of an entry that is sound otherwise, or None."""
    streams, parts = entry.get("streams", {}), SCHEMES[entry["scheme"]].coded_parts
    if not isinstance(streams, dict) or not streams.keys() <= {*parts}:
        return f"streams: expected some of {', '.join(parts)}, found {short(streams)}"
    for part, stream in streams.items():
        known = isinstance(stream, dict) and stream.keys() == {"coder", "bytes"}
        if not known or type(stream["bytes"]) is not int or not 0 <= stream["bytes"] < 1 << 40:
            return f"streams.{part}: expected a coder and its bytes, found {short(stream)}"
        if stream["coder"] not in list(CODERS):
            return f"streams.{part}.coder: expected one of {list(CODERS)}, found {short(stream['coder'])}"
    return None


def encoded(entry: Entry, parts: Mapping[str, Tensor], coder: str) -> tuple[Entry, dict[str, Tensor]]:
    """(entry, parts) with each packed part by this coder, where that makes it smaller."""
    streams, result, scheme = {}, dict(parts), SCHEMES[entry["scheme"]]
    for part in scheme.coded_parts:
        coded = CODERS[coder].encode(parts[part], scheme.code_bits(entry))
        if len(coded) < len(parts[part]):
            result[part], streams[part] = coded, {"coder": coder, "bytes": len(coded)}
    return ({**entry, "streams": streams} if streams else entry), result


def decoded(entry: Entry, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts that the scheme's layout asks for. Raises FormatError."""
    result, scheme = dict(parts), SCHEMES[entry["scheme"]]
    for part, stream in entry.get("streams", {}).items():
        _, (size,) = scheme.layout(entry, "float32")[part]
        result[part] = CODERS[stream["coder"]].decode(parts[part], size, scheme.code_bits(entry))
        if result[part].dtype != torch.uint8 or result[part].shape != (size,):
            raise FormatError(
                f"{part}: expected {size} bytes, found {len(result[part])}; the file is damaged"
            )
    return result
