"""fairseq-qn train on 60 rows: the file, the table, the script; killed and called again; what is refused."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import train as fairseq_train
from labelled import QUIET, tiny_model, write_recipe, write_sets  # noqa: F401

from fairseq_qn import api, hub
from fairseq_qn.cli import main
from fairseq_qn.commands import plan, schedule, train
from fairseq_qn.models.starting import start_from

pytestmark = QUIET

NAMES = ("dense", "at_once", "small")


def words_of(folder: Path, tiny: Path, kind: str, *more: str) -> list[str]:
    """A command over 60 and 20 rows: 4 updates of dense fine-tuning, then 112 in stages."""
    sets, recipe = write_sets(folder, kind), write_recipe(folder)
    words = ["train", "--model", str(tiny), *sets, "-o", str(folder / "m.qn.safetensors")]
    return [*words, "--recipe", str(recipe), "--epochs", "2", *more]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages of 2 updates, and fairseq-train in this process."""
    monkeypatch.setattr(schedule, "SHORTEST_STAGE", 20)
    monkeypatch.setattr(train, "watch", here)


def here(words: list[str], folder: Path, log: Path, *_: object) -> None:
    """In place of `watch`: fairseq-train in this process, which has the plugin already."""
    at = words.index("--user-dir")
    given = [*words[1:at], *words[at + 2 :], "--cpu"]
    args = options.parse_args_and_arch(options.get_training_parser(), input_args=given)
    log.touch()
    before = Path.cwd()
    os.chdir(folder)
    try:
        fairseq_train.main(convert_namespace_to_omegaconf(args))
    finally:
        os.chdir(before)


@pytest.mark.parametrize(("kind", "measure"), [("classes", "accuracy"), ("numbers", "spearman")])
def test_to_the_small_file(
    kind: str, measure: str, tiny: Path, tmp_path: Path, short, monkeypatch, capsys
) -> None:
    words = words_of(tmp_path, tiny, kind, "--json")
    assert main(words) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert list(rows) == [*NAMES] and all(row["rows"] == 20 for row in rows.values())
    assert all(-100 <= row[measure] <= 100 for row in rows.values())
    small = tmp_path / "m.qn.safetensors"
    assert rows["small"]["bytes"] == small.stat().st_size < rows["dense"]["bytes"] / 2
    file = api.read(small)
    assert {entry["stage"] if "stage" in entry else 1 for entry in file.manifest["layers"].values()}
    interface = hub.load_interface(small)
    answer = interface.regress("the door") if kind == "numbers" else interface.classify("the door")
    assert isinstance(answer, float) or {label for label, _ in answer} == {"early", "rather late"}
    log = (tmp_path / "m.work" / "small.log").read_text()
    assert "frozen" not in log.replace("froze 0", "")  # all was frozen by the stages

    # called again: nothing is trained anew
    monkeypatch.setattr(train, "watch", lambda *_: pytest.fail("trained again"))
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    assert main([*words, "--seed", "2"]) == 1
    assert "another seed" in capsys.readouterr().err

    # what is fine-tuned is taken as it is; its labels, their order and its BPE are known
    dense = str(tmp_path / "m.work" / "dense" / "checkpoint_last.pt")
    again = [dense if word == str(tiny) else word for word in words if word != "--json"]
    again[again.index("-o") + 1] = str(tmp_path / "n.qn.safetensors")
    assert main([*again, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "fine-tuned for these labels already" in said and said.count("fairseq-train") == 1
    assert not (tmp_path / "n.work").exists()

    # what was fine-tuned from an import has its BPE: `compress` and `predict` find it
    if kind == "classes":
        file = str(tmp_path / "o.qn.safetensors")
        assert main(["compress", dense, "--recipe", str(tmp_path / "recipe.yaml"), "-o", file]) == 0
        capsys.readouterr()
        for model in (file, dense):
            assert main(["predict", model, "the door", "--json"]) == 0
            answers = json.loads(capsys.readouterr().out)["answers"]
            assert {item["text"] for item in answers} == {"early", "rather late"}


def test_a_small_file_is_a_start(tiny: Path, tmp_path: Path, short, capsys) -> None:
    """Its weights, decoded, are what training starts from; another head is made for other labels."""
    assert main(words_of(tmp_path, tiny, "classes")) == 0
    small = tmp_path / "m.qn.safetensors"
    start = start_from(small, tmp_path / "start")
    assert start.labels == ("early", "rather late") and start.bpe.name == "qn_wordpiece"
    model = hub.load_checkpoint(start.checkpoint, str(tmp_path / "m.work" / "data"))[0]
    wanted = api.load(small).state_dict()
    found = model.state_dict()
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())
    (tmp_path / "p").mkdir()
    capsys.readouterr()
    assert main(words_of(tmp_path / "p", small, "pairs", "--dry-run")) == 0
    assert capsys.readouterr().out.count("fairseq-train ") == 2


def test_killed_and_called_again(tiny: Path, tmp_path: Path) -> None:
    """In fresh processes: killed in the stages, it goes on from the checkpoint, alone."""
    command = [sys.executable, "-m", "fairseq_qn.cli", *words_of(tmp_path, tiny, "pairs")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    work = tmp_path / "m.work"
    with (tmp_path / "out").open("wb") as out:
        first = subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=tmp_path)
        deadline = time.monotonic() + 240
        while not (work / "staged" / "checkpoint_last.pt").exists():
            assert first.poll() is None, (tmp_path / "out").read_text()[-2000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        first.send_signal(signal.SIGKILL)
        first.wait()
    second = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "fine-tuning, dense: done before" in second.stdout
    assert "noise, then stages" in second.stdout and "fairseq-train " in second.stdout
    log = (work / "staged.log").read_text()
    assert "Loaded checkpoint staged/checkpoint_last.pt (epoch 51 @ 100 updates)" in log
    assert sorted(json.loads((work / "result.json").read_text())) == sorted(NAMES)
    assert os.access(work / "train.sh", os.X_OK)
    assert subprocess.run(["bash", "-n", work / "train.sh"]).returncode == 0
    text = (work / "train.sh").read_text()
    assert text.count("\nfairseq-train ") == 2 and text.count("\nfairseq-qn compress") == 2


def test_the_plan_is_printed_and_nothing_written(tiny: Path, tmp_path: Path, capsys) -> None:
    words = words_of(tmp_path, tiny, "numbers")
    before = {*tmp_path.rglob("*")}
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "numbers, head sentence_classification_head" in said and "dense: 4 updates" in said
    assert "--regression-target" in said and said.count("fairseq-train ") == 2
    assert f"--finetune-from-model {tmp_path}/m.work/data/model/model.pt" in said.replace(" \\\n   ", "")
    assert {*tmp_path.rglob("*")} == before


def test_what_fails_is_said_in_a_line(tiny: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "fairseq-train").write_text("#!/bin/sh\necho first\necho the cause >&2\nexit 3\n")
    (programs / "fairseq-train").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    words = words_of(tmp_path, tiny, "classes")
    assert main(words) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "status 3" in err and "its last line: the cause" in err
    assert not list((tmp_path / "m.work").glob("*.done"))


def test_what_was_wrong_with_the_rows_is_mended(tiny: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Nothing was begun yet, so that other rows are no other training."""
    monkeypatch.setattr(train, "_run", lambda *_: pytest.exit("begun"))
    words = words_of(tmp_path, tiny, "classes")
    rows = (tmp_path / "train.tsv").read_text()
    (tmp_path / "train.tsv").write_text(f"{rows}no second column\n")
    assert main(words) == 1
    assert "train.tsv: line 61: expected 2 columns" in capsys.readouterr().err
    (tmp_path / "train.tsv").write_text(rows)
    with pytest.raises(pytest.exit.Exception, match="begun"):
        main(words)
    (tmp_path / "train.tsv").write_text(f"{rows}late\tthe door\n")
    assert main(words) == 1
    assert "another train;" in capsys.readouterr().err


def test_fairseqs_chatter_stays_out(tmp_path: Path, monkeypatch, caplog) -> None:
    """Of our own commands the result goes to their log; what is wrong is still said."""

    def talks(words: list[str]) -> int:
        logging.getLogger("fairseq").info("a dictionary")
        logging.getLogger("fairseq").warning(words[0])
        print("a file")
        return 0

    monkeypatch.setattr(train, "main", talks)
    caplog.set_level(logging.INFO)
    train._here(plan.Step("small", "the small file", ("fairseq-qn", "compress")), tmp_path / "log")
    assert caplog.messages == ["compress"] and (tmp_path / "log").read_text() == "a file\n"
    logging.getLogger("fairseq").info("later")
    assert caplog.messages == ["compress", "later"]


def test_one_at_a_time(tiny: Path, tmp_path: Path, capsys) -> None:
    words = words_of(tmp_path, tiny, "classes")
    (tmp_path / "m.work").mkdir()
    with train._alone(tmp_path / "m.work"):
        assert main(words) == 1
    assert "another training is at work there" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--recipe", "nowhere"], "nowhere"),
        (["--model", "nowhere"], "nowhere"),
        (["--valid", "nowhere.tsv"], "nowhere.tsv"),
        (["-o", "."], "expected the name of a file"),
    ],
)
def test_refused(more: list[str], said: str, tiny: Path, tmp_path: Path, capsys) -> None:
    assert main([*words_of(tmp_path, tiny, "classes"), *more]) == 1
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize("more", [["--epochs", "0"], ["--lr", "x"], ["--labels", "stars"]])
def test_wrong_usage(more: list[str], tiny: Path, tmp_path: Path) -> None:
    with contextlib.suppress(SystemExit):
        main([*words_of(tmp_path, tiny, "classes"), *more])
        pytest.fail("taken")
