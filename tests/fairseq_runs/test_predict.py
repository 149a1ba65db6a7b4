"""fairseq-qn predict where lines are bad, options stand anywhere, and whoever reads has had enough."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from fairseq_run import BIN, VALUES, sentences, train

import fairseq_qn
from fairseq_qn import hub
from fairseq_qn.cli import main
from fairseq_qn.errors import UnsupportedError

LINES = sentences(3, 9)


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


LONG = "ka " * 200
MIXED = [*sentences(40, 5), "ka", "", f"{LINES[0]}\t{LINES[1]}", LONG, *sentences(40, 6)]


def test_lines_that_cannot_be_answered(small: Path, tmp_path: Path) -> None:
    """Not UTF-8: named once, by its number, and the other lines are answered, an empty one too. Too long:
    cut, and counted at the end.
    """
    lines = [LINES[0].encode(), LONG.encode(), b"ka \xff\xfe lo", b"", LINES[1].encode()]
    done = shell(f"fairseq-qn predict {small} --json", tmp_path, b"\n".join(lines))
    assert [json.loads(row)["input"] for row in done.stdout.splitlines()] == [LINES[0], LONG, "", LINES[1]]
    bad, cut = done.stderr.decode().splitlines()
    assert bad.startswith("fairseq-qn: line 3: expected UTF-8")
    assert cut == "fairseq-qn: 1 of 5 sentences cut to 64 tokens"
    assert done.returncode == 1


def test_sentences_that_cannot_be_answered(small: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--no-cut", LONG, "ka \udcff", f"{LONG}<mask>", LINES[0], "<mask> <mask>"]
    assert main(["predict", str(small), *words]) == 1
    said = capsys.readouterr()
    assert [row for row in said.out.splitlines() if not row.startswith(" ")] == [LINES[0]]
    assert [row.split(":")[1] for row in said.err.splitlines()] == [f" sentence {n}" for n in (1, 2, 3, 5)]
    assert "sentence 1: expected up to 64 tokens, found " in said.err


def rows_of(text: str) -> list[tuple[str, list[str], list[float]]]:
    found = [json.loads(row) for row in text.splitlines()]
    return [
        (row["input"], *([answer[key] for answer in row["answers"]] for key in ("text", "score")))
        for row in found
    ]


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_a_batch_answers_as_one_at_a_time_and_in_order(
    mode: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Padding does not leak, whatever stands beside a sentence; fillings and labels mix."""
    lines = [*MIXED, "ka <mask>", *sentences(3, 7), f"{LINES[0]} <mask> lo"]
    (tmp_path / "in").write_text("".join(f"{line}\n" for line in lines))
    found = []
    for size in ("1", "7", "64"):
        out = tmp_path / f"{size}.jsonl"
        words = ["--input", str(tmp_path / "in"), "--output", str(out), "--batch", size, "--mode", mode]
        assert main(["predict", str(small), *words]) == 0
        found.append(rows_of(out.read_text()))
    *_, speed = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"fairseq-qn: {len(lines)} sentences in [\d.]+ s, [\d,]+ a second", speed)
    for other in found[1:]:
        for (line, texts, scores), (same, others, their_scores) in zip(found[0], other, strict=True):
            assert (line, texts) == (same, others)
            assert scores == pytest.approx(their_scores, abs=1e-5)
    assert [row[0] for row in found[0]] == lines


def test_the_hub_answers_a_list(small: Path) -> None:
    found = hub.load_interface(small)
    pair = (LINES[0], LINES[1])
    many = found.classify([LINES[0], pair, *MIXED[:9], "ka"], batch=4)
    alone = [found.classify(LINES[0]), found.classify(*pair), *map(found.classify, [*MIXED[:9], "ka"])]
    assert [[label for label, _ in row] for row in many] == [[label for label, _ in row] for row in alone]
    for row, other in zip(many, alone, strict=True):
        assert dict(row) == pytest.approx(dict(other), abs=1e-5)
    assert found.classify([]) == [] and found.classify([LINES[0]])[0][0][0] == alone[0][0][0]
    masked = [f"{line} <mask>" for line in MIXED[:5]]
    for row, sentence in zip(found.fill_mask(masked, topk=2), masked, strict=True):
        assert [text for text, *_ in row] == [text for text, *_ in found.fill_mask(sentence, topk=2)]
    for wrong in ((["ka"], "lo"), (("ka", "lo"),)):
        with pytest.raises(UnsupportedError, match="one list of sentences"):
            found.classify(*wrong)


def test_cut_to_the_positions_and_no_further(small: Path) -> None:
    """Each sentence keeps its end symbol; the longer of a pair gives way."""
    found = hub.load_interface(small)
    short = found.encode(LINES[0])
    for sentences_, count in (((LONG,), 1), ((LONG, LINES[0]), 3), ((LINES[0], LONG), 3), ((LONG, LONG), 3)):
        tokens, cut = found.encode_cut(*sentences_)
        assert cut and 63 <= len(tokens) <= 64
        assert int((tokens == 2).sum()) == count and tokens[-1] == 2 and tokens[0] == 0
        if sentences_[0] == LINES[0]:
            assert tokens[: len(short)].equal(short)
        if sentences_[-1] == LINES[0]:
            assert tokens[-len(short) + 1 :].equal(short[1:])
    assert found.encode_cut(LINES[0])[1] is False


def test_values_of_a_list(data, tmp_path: Path) -> None:
    run = train(tmp_path / "run", data.values, VALUES, {"--max-update": 1, "--quant-noise-pq": 0.1})
    path, words = tmp_path / "v.qn.safetensors", ["--bpe", "sentencepiece", "--bpe-files", str(data.pieces)]
    assert main(["compress", str(run.folder / "checkpoint_last.pt"), "-o", str(path), *words]) == 0
    found = hub.load_interface(path)
    assert found.regress(MIXED[:9], batch=4) == pytest.approx(
        [found.regress(x) for x in MIXED[:9]], abs=1e-5
    )


def test_either_sentences_or_a_file(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["predict", str(small), "ka", "--input", str(tmp_path / "x")]) == 1
    assert main(["predict", str(small), "--input", str(tmp_path / "x")]) == 1
    (tmp_path / "in").write_text("ka\n")
    same = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "in")]
    assert main(["predict", str(small), *same]) == 1 and (tmp_path / "in").read_text() == "ka\n"
    assert capsys.readouterr().err.count("\n") == 3


def test_version(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"fairseq-qn {fairseq_qn.__version__}\n")


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
