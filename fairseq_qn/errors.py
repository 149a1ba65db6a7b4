"""Named errors. Each message is one line: what, where, expected, found, and what to do."""

from __future__ import annotations

import re
import reprlib
from typing import Any

MAX_MESSAGE = 300  # characters
_TAIL = 110  # of them for the end of a message that is cut: what was found, and what to do
_WORD = 100  # characters of a word (a path, a name) that a long message keeps
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 60
_REPR.maxdict = 8


def one_line(text: str, limit: int = MAX_MESSAGE) -> str:
    r"""`text` in at most `limit` printable characters: long words give way first, then the middle.

    >>> one_line("no layer 'a\nb'")
    "no layer 'a\\nb'"
    """
    # a name may take megabytes
    text = text if len(text) <= 8 * limit else f"{text[: 4 * limit]}{text[-4 * limit :]}"
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > limit:
        text = re.sub(rf"\S{{{_WORD + 1},}}", lambda match: _cut(match[0], _WORD, _WORD // 2), text)
    return _cut(text, limit, _TAIL)


def _cut(text: str, limit: int, tail: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - tail - 3]}...{text[-tail:]}"


def short(value: Any) -> str:
    """The repr, on one line, cut at 60 characters: a damaged file may hold anything, of any size."""
    text = _REPR.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class QNError(Exception):
    """Base of every error that fairseq_qn raises for bad input. Its message is one line of at most
    MAX_MESSAGE characters, whatever names, paths and values went into it.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class RecipeError(QNError):
    """A recipe that cannot be read, or whose lines contradict one another."""


class NoLayerMatched(RecipeError):
    """A rule, a `keep` line or a stage that takes no layer of the model."""


class BlockSizeError(RecipeError):
    """A block size that does not divide the dimension which it must divide."""


class NonFiniteWeight(QNError):
    """NaN or Inf in a weight that is to be quantised."""


class ViewError(QNError):
    """A weight view that cannot be read, or a module that cannot carry one."""


class FormatError(QNError):
    """A small file that is damaged, incomplete, of another version, or not such a file at all."""


class MismatchError(QNError):
    """A file or checkpoint whose tensors do not fit the model that they are loaded into."""


class DataError(QNError):
    """Labelled sentences that cannot be read, or that do not suit the model."""


class TrainingError(QNError):
    """A command that was run for the user, and failed."""


class UnsupportedError(QNError):
    """A combination that fairseq_qn refuses, with the reason."""


class EncodeError(QNError, ValueError):
    """Data that the small file cannot hold: a code too wide for its bits, no plain data."""
