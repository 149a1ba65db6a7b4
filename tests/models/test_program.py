"""`fairseq-qn predict` as a program of its own, which puts off much of torch and fairseq."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from described import KINDS, save

from fairseq_qn.cli import main

CODE = """
import sys
from fairseq_qn.cli import main
status = main()
names = ("fairseq.models.wav2vec", "fairseq.tasks.denoising", "torch._meta_registrations", "sacrebleu")
print([name for name in names if type(sys.modules.get(name)) is type(sys)])
sys.exit(status)
"""


@pytest.mark.parametrize("mode", ["dense", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_program_answers_as_a_function(
    kind: str, mode: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["predict", str(save(kind, tmp_path / "a.qn.safetensors")), "ka lo", "lo", "--mode", mode]
    status = main(words)
    expected = capsys.readouterr().out
    command = [sys.executable, "-c", CODE, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert status == 0 == done.returncode, done.stderr
    *answers, loaded = done.stdout.splitlines()
    assert answers == expected.splitlines() and len(answers) > 2
    assert loaded == "[]"
