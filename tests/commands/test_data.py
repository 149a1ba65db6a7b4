"""fairseq-qn data: what fairseq's own task reads from the folder, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fairseq import tasks
from hypothesis import given
from hypothesis import strategies as st
from labelled import KINDS, QUIET, tiny_model, write_sets  # noqa: F401
from omegaconf import OmegaConf

import fairseq_qn  # noqa: F401
from fairseq_qn import hub
from fairseq_qn.cli import main
from fairseq_qn.interop.tsv import read_tsv
from fairseq_qn.models.starting import BPE, start_from
from fairseq_qn.tasks.sentence_data import _cut

pytestmark = QUIET

HEAD = "sentence_classification_head"


def make(tmp_path: Path, tiny: Path, kind: str, *more: str) -> Path:
    """The folder that `data` makes of 60 and 20 rows."""
    write_sets(tmp_path, kind)
    out = tmp_path / "out"
    words = ["data", str(tmp_path / "train.tsv"), str(tmp_path / "valid.tsv"), "-o", str(out)]
    assert main([*words, "--model", str(tiny), *more]) == 0
    return out


def task_of(folder: Path) -> object:
    """fairseq's own sentence_prediction over a folder, from the options of data.json."""
    data = json.loads((folder / "data.json").read_text())
    options = {"_name": "sentence_prediction", "data": str(folder), "init_token": 0, "separator_token": 2}
    options |= {"num_classes": len(data["labels"] or [0]), "regression_target": data["labels"] is None}
    options |= {"max_positions": data["max_positions"], "no_shuffle": True, "shorten_method": "none"}
    options |= {"classification_head_name": data["head"], "seed": 1, "d2v2_multi": False}
    options |= {"add_prev_output_tokens": False, "shorten_data_split_list": ""}
    return tasks.setup_task(OmegaConf.create(options))


@pytest.mark.parametrize("kind", KINDS)
def test_fairseqs_own_task_reads_it(kind: str, tiny: Path, tmp_path: Path) -> None:
    """Each row is there once, with the tokens that the hub interface makes of it and with its label."""
    folder = make(tmp_path, tiny, kind)
    task = task_of(folder)
    start = start_from(folder / "model" / "model.pt", tmp_path / "again", _bpe(folder))
    interface = hub.QNRobertaHub(OmegaConf.create({"bpe": None}), task, torch.nn.Module())
    interface.bpe = start.bpe.build()
    for split in ("train", "valid"):
        rows = read_tsv(tmp_path / f"{split}.tsv")
        found = task.load_dataset(split)
        labels = json.loads((folder / "data.json").read_text())["labels"]
        wanted = sorted(
            ([*interface.encode(*row.sentences).tolist()], _target(row.label, labels)) for row in rows
        )
        got = sorted(
            (
                found[i]["net_input.src_tokens"].tolist(),
                torch.as_tensor(found[i]["target"]).flatten().tolist(),
            )
            for i in range(len(found))
        )
        assert len(got) == len(wanted) and max(len(tokens) for tokens, _ in got) <= 20
        whole = [pair for pair in wanted if len(pair[0]) <= 20]
        assert all(pair in got for pair in whole) and len(whole) > len(wanted) // 2
    lengths = [len(task.dataset("train")[i]["net_input.src_tokens"]) for i in range(60)]
    assert lengths == sorted(lengths)


def _target(label: str, labels: list[str] | None) -> list[float]:
    return [float(label)] if labels is None else [labels.index(label)]


def _bpe(folder: Path) -> BPE:
    return BPE("qn_wordpiece", (folder / "model" / "vocab.txt",), {})


def test_thousands_of_labels(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("".join(f"label {i % 3000}\tthe door\n" for i in range(6000)))
    out = tmp_path / "out"
    words = ["data", str(tmp_path / "t.tsv"), str(tmp_path / "t.tsv"), "-o", str(out), "--model", str(tiny)]
    assert main([*words, "--head", "intent"]) == 0
    task = task_of(out)
    assert len(task.label_dictionary) - task.label_dictionary.nspecial == 3001  # fairseq adds <mask>
    names = json.loads((out / "data.json").read_text())["labels"]
    valid = task.load_dataset("valid")
    found = {int(valid[i]["target"]) for i in range(6000)}
    assert found == {*range(3000)} and names == sorted(names)
    assert "--classification-head-name intent" in (out / "README.md").read_text()


def test_whole_numbers_are_classes_unless_said(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("1\tthe door\n0\ta code\n2\the said\n")
    for more, labels in (((), ["0", "1", "2"]), (("--labels", "numbers"), None)):
        out = tmp_path / f"out{len(more)}"
        words = ["data", *[str(tmp_path / "t.tsv")] * 2, "-o", str(out), "--model", str(tiny), *more]
        assert main(words) == 0
        assert json.loads((out / "data.json").read_text())["labels"] == labels


@pytest.mark.parametrize(
    ("train", "valid", "said"),
    [
        ("", "a\tx\n", "train.tsv: expected lines of label"),
        ("a\tx\nb\ty\n", "\n", "valid.tsv: expected lines of label"),
        ("a\tx\nb\ty\n", "a\tx\nc\ty\nd\tz\n", "valid.tsv: line 2 and 1 more: expected a label of"),
        ("a\tx\nb\n", "a\tx\n", "train.tsv: line 2: expected 2 columns"),
        ("a\tx\nb\ty\n", "a\tx\ty\n", "valid.tsv: expected 1 sentences a row as in"),
        ("a\tx\n<pad>\ty\n", "a\tx\n", "train.tsv: line 2: fairseq uses the name '<pad>'"),
        ("a\tx\na\ty\n", "a\tx\n", "train.tsv: expected at least two labels, found only 'a'"),
        ("0.5\tx\nb\ty\n", "0.5\tx\n", None),
    ],
)
def test_refused(train: str, valid: str, said: str | None, tiny: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "train.tsv").write_text(train)
    (tmp_path / "valid.tsv").write_text(valid)
    words = ["data", str(tmp_path / "train.tsv"), str(tmp_path / "valid.tsv"), "-o", str(tmp_path / "out")]
    status = main([*words, "--model", str(tiny)])
    err = capsys.readouterr().err
    if said is None:  # classes, one of which looks like a number
        assert status == 0
        return
    assert status == 1 and err.count("\n") == 1 and said in err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))


def test_numbers_that_are_none(tiny: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "t.tsv").write_text("0.5\tthe\nnan\ta\n")
    words = ["data", *[str(tmp_path / "t.tsv")] * 2, "-o", str(tmp_path / "out"), "--model", str(tiny)]
    assert main([*words, "--labels", "numbers"]) == 1
    assert "line 2: expected a number as label, found 'nan'" in capsys.readouterr().err


def test_nothing_is_overwritten(tiny: Path, tmp_path: Path, capsys) -> None:
    out = make(tmp_path, tiny, "classes")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    words = ["data", str(tmp_path / "train.tsv"), str(tmp_path / "valid.tsv"), "-o", str(out)]
    assert main([*words, "--model", str(tiny)]) == 1
    assert "expected a new or an empty folder" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_checkpoint_without_a_bpe(tiny: Path, tmp_path: Path, capsys) -> None:
    """Nothing is guessed: another BPE would only lose accuracy, in silence."""
    folder = make(tmp_path, tiny, "classes")
    state = torch.load(folder / "model" / "model.pt", weights_only=True)
    vars(state["args"]).pop("bpe", None)
    (tmp_path / "c").mkdir()
    torch.save(state, tmp_path / "c" / "model.pt")
    (tmp_path / "c" / "dict.txt").write_bytes((folder / "model" / "dict.txt").read_bytes())
    words = ["data", str(tmp_path / "train.tsv"), str(tmp_path / "valid.tsv"), "-o", str(tmp_path / "o2")]
    words += ["--model", str(tmp_path / "c" / "model.pt")]
    assert main(words) == 1
    assert "--bpe NAME --bpe-files FILE" in capsys.readouterr().err
    vocabulary = str(folder / "model" / "vocab.txt")
    assert main([*words, "--bpe", "qn_wordpiece", "--bpe-files", vocabulary]) == 0
    for name in ("input0/train.bin", "label/train.bin"):
        assert (tmp_path / "o2" / name).read_bytes() == (folder / name).read_bytes()
    (tmp_path / "c" / "dict.txt").write_text("the 1\n")
    assert main([*words, "-o", str(tmp_path / "o3")]) == 1
    assert "its embedding has" in capsys.readouterr().err


@given(st.lists(st.integers(0, 60), min_size=1, max_size=2), st.integers(2, 60))
def test_what_is_cut(lengths: list[int], room: int) -> None:
    """Only what has to go goes, and of a pair the longer sentence's end first."""
    parts = [torch.arange(n) for n in lengths]
    cut = _cut(parts, room)
    assert sum(map(len, cut)) == min(room, sum(lengths))
    assert all(torch.equal(a, b[: len(a)]) for a, b in zip(cut, parts, strict=True))
    if len(parts) == 2 and sum(lengths) > room:
        a, b = map(len, cut)
        shorter = min(range(2), key=lengths.__getitem__)
        assert abs(a - b) <= 1 or len(cut[shorter]) == lengths[shorter]
