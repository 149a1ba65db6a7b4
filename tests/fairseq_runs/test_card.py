"""A model card for the Hub, and folders that go there and back: against a stand-in for its client, with the
signatures of the real one.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

import fairseq_qn
from fairseq_qn.cli import main
from fairseq_qn.commands.push import CARRIED

SCORES = {"accuracy": 87.5, "macro_f1": 86.25, "pearson": None, "sentences": 1234, "data": "dev.tsv"}


def parts(text: str) -> tuple[dict[str, Any], str, str]:
    """(front matter, the rest, its Python)."""
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body, re.search(r"```python\n(.*?)```", body, re.S)[1]


def test_a_card(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Its front matter is the Hub's, its figures are the file's, and its Python answers."""
    file = Path(shutil.copy(small, tmp_path))
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    words = ["-o", str(tmp_path / "README.md"), "--licence", "cc-by-4.0", "--name", "Tiny: a 'test'"]
    assert main(["card", str(file), *words, "--scores", str(tmp_path / "scores.json")]) == 0
    front, body, code = parts((tmp_path / "README.md").read_text())
    assert front["license"] == "cc-by-4.0" and front["pipeline_tag"] == "text-classification"
    assert front["library_name"] == "fairseq" and "quantization" in front["tags"]
    (model,) = front["model-index"]
    assert model["name"] == "Tiny: a 'test'" and model["results"][0]["dataset"]["name"] == "dev.tsv"
    metrics = {metric["type"]: metric["value"] for metric in model["results"][0]["metrics"]}
    assert metrics == {"accuracy": 87.5, "f1": 86.25}
    size = fairseq_qn.inspect(file)["size"]
    assert f"{file.stat().st_size:,} bytes" in body and "On 1,234 sentences" in body
    assert f"| {32 * size['total'] / size['dense_bytes']:.2f} |" in body
    recipe = body.partition("## Recipe\n\n")[2].partition("\n\n## ")[0]
    assert yaml.safe_load(recipe) == fairseq_qn.inspect(file)["recipe"]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})  # what a reader of the card would type
    assert "early" in capsys.readouterr().out


def test_the_hub_reads_the_front_matter(small: Path, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "scores.json").write_text(json.dumps(SCORES))
    words = ["-o", str(tmp_path / "c.md"), "--license", "mit", "--scores", str(tmp_path / "scores.json")]
    assert main(["card", str(small), *words]) == 0
    card = hub.ModelCard.load(tmp_path / "c.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"accuracy": 87.5, "f1": 86.25} and card.data.license == "mit"


def test_a_masked_lm_and_a_model_of_ones_own(masked, tmp_path: Path) -> None:
    small = tmp_path / "m.qn.safetensors"
    assert main(["compress", str(masked.folder / "checkpoint_last.pt"), "-o", str(small)]) == 0
    assert main(["card", str(small), "-o", str(tmp_path / "c.md"), "--licence", "mit"]) == 0
    front, body, code = parts((tmp_path / "c.md").read_text())
    assert front["pipeline_tag"] == "fill-mask" and "fill_mask" in code and "## Scores" not in body


@pytest.mark.parametrize(
    ("words", "scores", "said"),
    [
        ([], None, "expected the licence of the weights, found None"),
        (["--licence", "MIT\nfoo: bar"], None, "expected the licence of the weights"),
        (["--licence", "mit"], "{", "found no JSON"),
        (["--licence", "mit"], "[1]", "found none of accuracy"),
        (["--licence", "mit"], '{"accuracy": "x"}', "accuracy: expected a number"),
        (["--licence", "mit"], '{"accuracy": NaN}', "accuracy: expected a number"),
    ],
)
def test_a_card_that_cannot_be(words, scores, said: str, small: Path, tmp_path: Path, capsys) -> None:
    if scores is not None:
        (tmp_path / "s.json").write_text(scores)
        words = [*words, "--scores", str(tmp_path / "s.json")]
    assert main(["card", str(small), "-o", str(tmp_path / "c.md"), *words]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and not (tmp_path / "c.md").exists()


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in that takes what the real client takes, and nothing else."""
    hub = pytest.importorskip("huggingface_hub")
    stand_in = mock.create_autospec(hub.HfApi, instance=True)
    monkeypatch.setattr(hub, "HfApi", lambda: stand_in)
    return stand_in


def test_push(small: Path, tmp_path: Path, client: Any, capsys: pytest.CaptureFixture) -> None:
    assert main(["push", str(tmp_path), "me/tiny"]) == 1
    shutil.copy(small, tmp_path)
    assert main(["push", str(tmp_path), "me/tiny"]) == 1
    assert "has no README.md; write one with" in capsys.readouterr().err
    client.upload_folder.assert_not_called()
    (tmp_path / "README.md").write_text("x")
    assert main(["push", str(tmp_path), "me/tiny", "--private"]) == 0
    client.create_repo.assert_called_once_with("me/tiny", private=True, exist_ok=True)
    sent = client.upload_folder.call_args.kwargs
    assert (sent["repo_id"], sent["folder_path"], sent["allow_patterns"]) == ("me/tiny", tmp_path, CARRIED)
    capsys.readouterr()
    client.create_repo.side_effect = ValueError("not yours\nmore")
    assert main(["push", str(tmp_path), "me/tiny"]) == 1
    assert capsys.readouterr().err == "fairseq-qn: me/tiny: ValueError: not yours\n"


def test_pull(small: Path, tmp_path: Path, client: Any, capsys: pytest.CaptureFixture) -> None:
    """What comes down is checked; a damaged file is named."""

    def down(repository: str, *, local_dir: Path, **_: Any) -> None:
        local_dir.mkdir()
        data = bytearray(small.read_bytes())
        if repository == "me/damaged":
            data[-5] ^= 1
        (local_dir / "a.qn.safetensors").write_bytes(data)

    client.snapshot_download.side_effect = down
    assert main(["pull", "me/tiny", str(tmp_path / "a"), "--revision", "v1"]) == 0
    assert client.snapshot_download.call_args.kwargs["allow_patterns"] == CARRIED
    assert client.snapshot_download.call_args.kwargs["revision"] == "v1"
    assert capsys.readouterr().out == f"{tmp_path / 'a' / 'a.qn.safetensors'}: good\n"
    assert main(["pull", "me/damaged", str(tmp_path / "b")]) == 1
    assert "a.qn.safetensors" in capsys.readouterr().err


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["pull", "me/tiny", str(tmp_path)]) == 1
    assert capsys.readouterr().err == (
        "fairseq-qn: this command needs huggingface_hub; install fairseq-qn[hub]\n"
    )
