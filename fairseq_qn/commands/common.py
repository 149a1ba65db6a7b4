"""What several commands need."""

from __future__ import annotations

import sys
from types import ModuleType

from fairseq_qn.errors import UnsupportedError, one_line


def complain(what: object) -> None:
    """One line on stderr."""
    print(f"fairseq-qn: {one_line(str(what))}", file=sys.stderr)


def hub() -> ModuleType:
    """fairseq_qn.hub, which needs fairseq. Raises UnsupportedError."""
    try:
        from fairseq_qn import hub
    except ImportError as error:
        raise UnsupportedError(f"this command needs fairseq, which cannot be imported: {error}") from None
    return hub
