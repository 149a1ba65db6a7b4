"""fairseq-qn evaluate: scores, agreement, and rows that cannot be scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fairseq_run import VALUES, Run, sentences, train

from fairseq_qn import hub
from fairseq_qn.cli import main

LINES = sentences(30, 11)


@pytest.fixture(scope="module")
def dev(small: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """(labelled sentences, how many the model answers wrongly: every third has the other label)."""
    found = hub.load_interface(small)
    rows = []
    for i, line in enumerate(LINES):
        (first, _), (second, _) = found.classify(line)
        rows.append(f"{line}\t{second if i % 3 == 0 else first}\n")
    path = tmp_path_factory.mktemp("dev") / "dev.tsv"
    path.write_text("sentence\tlabel\n" + "".join(rows) + "\n")
    return path, 10


def scores(capsys: pytest.CaptureFixture, *words: object) -> dict:
    capsys.readouterr()
    assert main(["evaluate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_classes(small: Path, dev: tuple[Path, int], capsys: pytest.CaptureFixture) -> None:
    path, wrong = dev
    found = scores(capsys, small, "--data", path, "--batch", 7)
    assert found["accuracy"] == pytest.approx(100 * (1 - wrong / 30)) and 0 < found["macro_f1"] < 100
    assert (found["sentences"], found["bytes"], found["cut"]) == (30, small.stat().st_size, 0)
    assert found["pearson"] is found["spearman"] is found["agreement"] is None
    assert found["ms_per_sentence"] > 0 and found["ms_per_sentence_batched"] > 0


def test_against_its_own_checkpoint(
    small: Path, dev: tuple[Path, int], classifier: Run, data, capsys: pytest.CaptureFixture
) -> None:
    """The checkpoint is frozen: it gives the file's answers, with the file's BPE or with one of its own."""
    checkpoint = classifier.folder / "checkpoint_last.pt"
    found = scores(capsys, small, "--data", dev[0], "--against", checkpoint)
    assert found["agreement"] >= 96 and found["against"]["bytes"] == checkpoint.stat().st_size
    bpe = ["--bpe", "sentencepiece", "--bpe-files", data.pieces]
    alone = scores(capsys, checkpoint, "--data", dev[0], *bpe)
    assert alone["accuracy"] == found["against"]["accuracy"] == pytest.approx(found["accuracy"], abs=4)
    assert main(["evaluate", str(small), "--data", str(dev[0]), "--against", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    assert f"{small.stat().st_size:,}" in printed and "30 sentences" in printed
    assert main(["evaluate", str(checkpoint), "--data", str(dev[0])]) == 1
    assert "carries no BPE; give it with --bpe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("early\tka\nmiddle\tlo\nlate\tmi\nso\tka\n", "lines 2 and 4: label 'middle' is not one of"),
        ("early\tka\nlate\n", "line 2: expected 2 columns"),
        (f"early\t{'ka ' * 200}\n", "line 1: longer than the model's positions"),
    ],
)  # fmt: skip
def test_bad_rows(rows: str, said: str, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "dev.tsv").write_text(rows)
    assert main(["evaluate", str(small), "--data", str(tmp_path / "dev.tsv"), "--no-cut"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_numbers(data, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = train(tmp_path / "run", data.values, VALUES, {"--max-update": 1, "--quant-noise-pq": 0.1})
    path, words = tmp_path / "v.qn.safetensors", ["--bpe", "sentencepiece", "--bpe-files", str(data.pieces)]
    assert main(["compress", str(run.folder / "checkpoint_last.pt"), "-o", str(path), *words]) == 0
    values = hub.load_interface(path).regress(LINES)
    rows = [f"{-value}\t{line}\n" for value, line in zip(values, LINES, strict=True)]
    (tmp_path / "dev.tsv").write_text("".join(rows))
    found = scores(capsys, path, "--data", tmp_path / "dev.tsv", "--against", path)
    assert [found[key] for key in ("pearson", "spearman", "agreement")] == pytest.approx([-1, -1, 1])
    assert found["accuracy"] is None


def test_a_generator_is_refused(data, masked: Run, small: Path, dev, capsys: pytest.CaptureFixture) -> None:
    """A model without a head for classes says so."""
    words = ["--bpe", "sentencepiece", "--bpe-files", str(data.pieces)]
    checkpoint = str(masked.folder / "checkpoint_last.pt")
    assert main(["evaluate", checkpoint, "--data", str(dev[0]), *words]) == 1
    assert capsys.readouterr().err.count("\n") == 1
