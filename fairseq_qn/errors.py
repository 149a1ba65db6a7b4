"""Named errors. Each message is one line: what, where, expected, found, and what to do."""

from __future__ import annotations


class QNError(Exception):
    """Base of every error that fairseq_qn raises for bad input."""


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


class UnsupportedError(QNError):
    """A combination that fairseq_qn refuses, with the reason."""


class EncodeError(QNError, ValueError):
    """Data that the small file cannot hold: a code too wide for its bits, a manifest that is not plain data."""
