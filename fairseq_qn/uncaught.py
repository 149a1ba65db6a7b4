"""How an error of ours ends one of fairseq's commands: by its one line, last on stderr, without a traceback
above it. QN_TRACEBACK=1 shows the traceback.
"""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Callable
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
        hydra: Any = sys.modules.get("hydra._internal.utils")
        if hasattr(hydra, "run_and_report"):  # which prints what a job raises itself
            hydra.run_and_report = partial(_report, hydra.run_and_report)


def _end(before: Any, kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    if not _said(error):
        before(kind, error, traceback)


def _report(before: Any, job: Callable[[], Any]) -> Any:
    def run() -> Any:
        try:
            return job()
        except Exception as error:
            if _said(error):
                sys.exit(1)
            raise

    return before(run)


def _said(error: BaseException) -> bool:
    """Whether the error is one of ours; its line is on stderr then."""
    line = str(error) if isinstance(error, QNError) else None
    if type(error).__name__ == "ProcessRaisedException" and (match := _OF_ANOTHER.search(str(error))):
        line = one_line(match[1])
    if line is not None:
        print(f"fairseq-qn: {line}", file=sys.stderr, flush=True)
    return line is not None
