"""How an error of ours ends one of fairseq's commands: by its one line, last on stderr, without a traceback
above it. QN_TRACEBACK=1 shows the traceback.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from fairseq_qn.errors import QNError, one_line

# fairseq starts one process for each device, and torch raises their tracebacks again as text
_OF_ANOTHER = re.compile(r"^fairseq_qn\.errors\.\w+: (.*)\s*\Z", re.MULTILINE)


def attach() -> None:
    """In fairseq's commands only: what other programs do with an error is theirs."""
    program = Path(sys.argv[0] if sys.argv else "")
    ours = program.name.startswith("fairseq-") or program.parent.name == "fairseq_cli"
    if ours and not os.environ.get("QN_TRACEBACK") and not isinstance(sys.excepthook, partial):
        # ten lines of Hydra's on how fairseq uses it
        warnings.filterwarnings("ignore", category=UserWarning, module=r"hydra\.|sys$")
        sys.excepthook = partial(_end, sys.excepthook)


def _end(before: Any, kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    line = str(error) if isinstance(error, QNError) else None
    if kind.__name__ == "ProcessRaisedException" and (match := _OF_ANOTHER.search(str(error))):
        line = one_line(match[1])
    if line is None:
        before(kind, error, traceback)
    else:
        print(f"fairseq-qn: {line}", file=sys.stderr, flush=True)
