"""An error of ours ends a command of fairseq's by one line; other errors and programs are left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OURS = "RecipeError('recipe r: expected a mapping')"
AGAIN = """type('ProcessRaisedException', (Exception,), {})(
    '\\n\\n-- Process 1 terminated with the following error:\\nTraceback:\\n  File "x"'
    '\\nfairseq_qn.errors.RecipeError: recipe r: expected a mapping\\n')"""


def end(
    error: str, program: str, tmp_path: Path, hydra: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """A process of this name that loads the plug-in as fairseq does, and raises; `hydra`: in a job of
    Hydra's.
    """
    code = f"""
import sys
sys.argv = [{program!r}]
import hydra._internal.utils as hydra
from fairseq_qn import uncaught
from fairseq_qn.errors import RecipeError
uncaught.attach()
uncaught.attach()
def job():
    raise {error}
hydra.run_and_report(job) if {hydra} else job()
"""
    path = tmp_path / "program.py"
    path.write_text(code)
    return subprocess.run(
        [sys.executable, str(path)], capture_output=True, text=True, timeout=60, env={**os.environ, **env}
    )


@pytest.mark.parametrize("program", ["/bin/fairseq-train", "/site-packages/fairseq_cli/train.py"])
@pytest.mark.parametrize("error", [OURS, AGAIN])
@pytest.mark.parametrize("hydra", [False, True])
def test_ours_ends_fairseqs_commands_by_its_line(
    error: str, program: str, hydra: bool, tmp_path: Path
) -> None:
    done = end(error, program, tmp_path, hydra)
    assert done.returncode == 1
    assert done.stderr == "fairseq-qn: recipe r: expected a mapping\n"


@pytest.mark.parametrize(
    ("error", "program", "env"),
    [
        ("ValueError('recipe r')", "/bin/fairseq-train", {}),
        (OURS, "/bin/my-train", {}),
        (OURS, "/bin/fairseq-train", {"QN_TRACEBACK": "1"}),
    ],
)
@pytest.mark.parametrize("hydra", [False, True])
def test_all_else_keeps_its_traceback(
    error: str, program: str, env: dict[str, str], hydra: bool, tmp_path: Path
) -> None:
    done = end(error, program, tmp_path, hydra, **env)
    assert done.returncode == 1 and done.stderr.startswith("Traceback") and "recipe r" in done.stderr
