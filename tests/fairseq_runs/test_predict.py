"""fairseq-qn predict where lines are bad, options stand anywhere, and whoever reads has had enough."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from fairseq_run import BIN, Run, sentences

from fairseq_qn.cli import main

LINES = sentences(3, 9)


@pytest.fixture(scope="module")
def small(data, classifier: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "classifier.qn.safetensors"
    words = ["--bpe", "sentencepiece", "--bpe-files", str(data.pieces)]
    assert main(["compress", str(classifier.folder / "checkpoint_last.pt"), "-o", str(path), *words]) == 0
    return path


def shell(script: str, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """What bash makes of a script in a fresh process, with fairseq-qn on its path."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "",
    }
    return subprocess.run(
        ["bash", "-c", script], cwd=cwd, env=env, input=stdin, capture_output=True, timeout=300
    )


def test_lines_that_cannot_be_answered(small: Path, tmp_path: Path) -> None:
    """Too long, and not UTF-8: each is named once, by its number, and the other lines are answered, an empty
    one too.
    """
    lines = [LINES[0].encode(), b"ka " * 200, b"ka \xff\xfe lo", b"", LINES[1].encode()]
    done = shell(f"fairseq-qn predict {small} --json", tmp_path, b"\n".join(lines))
    assert [json.loads(row)["input"] for row in done.stdout.splitlines()] == [LINES[0], "", LINES[1]]
    first, second = done.stderr.decode().splitlines()
    assert (
        first.startswith("fairseq-qn: line 2: expected up to 64 tokens, found ")
        and "line 3: expected UTF-8" in second
    )
    assert done.returncode == 1


def test_sentences_that_cannot_be_answered(small: Path, capsys: pytest.CaptureFixture) -> None:
    long = "ka " * 200
    assert main(["predict", str(small), long, "ka \udcff", f"{long}<mask>", LINES[0], "<mask> <mask>"]) == 1
    said = capsys.readouterr()
    assert [row for row in said.out.splitlines() if not row.startswith(" ")] == [LINES[0]]
    assert [row.split(":")[1] for row in said.err.splitlines()] == [f" sentence {n}" for n in (1, 2, 3, 5)]


def test_what_is_wrong_with_every_line_is_said_once(small: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["predict", str(small), *LINES, "--head", "mood"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("words", ["predict {} ka", "predict --help"])
def test_nobody_reads(words: str, small: Path, tmp_path: Path) -> None:
    """A pipe that is closed before anything is written to it, for good at the end of the process."""
    done = shell(f"fairseq-qn {words.format(small)} | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")


def test_only_the_first_line_is_read(small: Path, tmp_path: Path) -> None:
    """A pipe that is closed while lines are answered: more of them than it and its buffers hold."""
    script = (
        f"for i in $(seq 30); do echo {'é' * 2000}; done | PYTHONUNBUFFERED=1 fairseq-qn predict {small}"
    )
    done = shell(f"{script} | head -1; exit ${{PIPESTATUS[1]}}", tmp_path)
    assert (done.returncode, done.stdout.count(b"\n"), done.stderr) == (0, 1, b"")


@pytest.mark.parametrize("place", range(3))
def test_options_stand_anywhere(place: int, small: Path, capsys: pytest.CaptureFixture) -> None:
    words = [str(small), LINES[0], LINES[1]]
    words[place:place] = ["--top", "1", "--json"]
    assert main(["predict", *words]) == 0
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert [row["input"] for row in rows] == LINES[:2] and all(len(row["answers"]) == 1 for row in rows)


def test_as_many_fillings_as_there_are(small: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["predict", str(small), "ka <mask>", "--top", "100000", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["answers"]) > 50


@pytest.mark.parametrize(
    "option", ["--top -1", "--top 0", "--top x", "--top ²", "--beam 0", "--iterations -3"]
)
def test_counts_are_positive(option: str, capsys: pytest.CaptureFixture) -> None:
    words = (
        ["compress", "x.pt", "-o", "y"] if "iterations" in option else ["predict", "x.qn.safetensors", "ka"]
    )
    with pytest.raises(SystemExit) as stop:
        main([*words, *option.split()])
    assert stop.value.code == 2 and "whole number of at least 1" in capsys.readouterr().err
