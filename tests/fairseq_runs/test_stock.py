"""Checkpoints to and from stock fairseq, which does not know the plugin."""

from __future__ import annotations

import errno
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from fairseq_run import MLM, RESETS, Run, build, command, differing, recipe, train, write_recipe

from fairseq_qn.cli import main
from fairseq_qn.modules.view import views_of

STOCK = {key: value for key, value in MLM.items() if key != "--wrapped-criterion"}
STOCK |= {"--task": "masked_lm", "--arch": "roberta", "--criterion": "masked_lm"}
STAGES = {
    "unfrozen": {},
    "half": {"--quant-stage-updates": "2,3,90"},
    "frozen": {"--quant-stage-updates": "2,3,4"},
}


@dataclass
class Pair:
    """A qn_ run, its exported stock checkpoint, and what stock fairseq says of that in a process of its
    own.
    """

    run: Run
    path: Path
    answer: dict


# loads each checkpoint strictly, and runs the data's first sentences through it; the plugin cannot be
# imported here
ASK = """
import sys, torch
from fairseq import checkpoint_utils
try:
    import fairseq_qn
    raise SystemExit("the plugin can be imported")
except ImportError:
    pass
tokens = torch.load(sys.argv[1])
answers = {}
for path in sys.argv[2:]:
    (model,), cfg, task = checkpoint_utils.load_model_ensemble_and_task([path], strict=True)
    with torch.no_grad():
        logits, _ = model.eval()(tokens)
    names = [type(model).__name__, type(task).__name__, cfg.criterion._name, cfg.task._name, cfg.model.arch]
    answers[path] = {"logits": logits, "names": names, "keys": sorted(model.state_dict())}
torch.save(answers, "answers.pt")
"""


@pytest.fixture(scope="module")
def tokens(data) -> torch.Tensor:
    return build(data.lm, STOCK).sample["net_input"]["src_tokens"]


@pytest.fixture(scope="module")
def exported(data, tokens, tmp_path_factory) -> dict[str, Pair]:
    """A run of each kind, taken to stock fairseq; a single fresh process reads all."""
    folder = tmp_path_factory.mktemp("exported")
    path = write_recipe(folder / "r.yaml", recipe())
    runs, paths = {}, {}
    for name, stages in STAGES.items():
        runs[name] = train(folder / name, data.lm, MLM, stages, {"--quant-recipe": path, "--max-update": 5})
        paths[name] = folder / f"{name}.pt"
        assert (
            main(["export-fairseq", str(folder / name / "checkpoint_last.pt"), "-o", str(paths[name])]) == 0
        )
    torch.save(tokens, folder / "tokens.pt")
    script = folder / "ask.py"
    script.write_text(ASK)
    done = command(
        sys.executable, script, folder / "tokens.pt", list(paths.values()), cwd=folder, plugin=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers = torch.load(folder / "answers.pt")
    return {name: Pair(runs[name], paths[name], answers[str(paths[name])]) for name in STAGES}


@pytest.mark.parametrize("name", STAGES)
def test_stock_fairseq_gives_equal_logits(
    name: str, exported: dict[str, Pair], tokens: torch.Tensor
) -> None:
    pair = exported[name]
    with torch.no_grad():
        logits, _ = pair.run.model(tokens)
    # decoded weights are the same numbers; only matrix products may be summed in another order
    assert torch.allclose(logits, pair.answer["logits"], atol=1e-5)
    assert pair.answer["names"] == ["RobertaModel", "MaskedLMTask", "masked_lm", "masked_lm", "roberta"]
    assert not [key for key in pair.answer["keys"] if key.endswith(("codes", "phase", "digest"))]


def test_what_is_not_frozen_keeps_its_stored_weights(exported: dict[str, Pair]) -> None:
    ours, stock = (
        torch.load(p, weights_only=True)["model"]
        for p in (exported["unfrozen"].run.path(5), exported["unfrozen"].path)
    )
    assert (
        differing(
            {k: v for k, v in ours.items() if not k.endswith(("codes", "phase", "digest"))}, dict(stock)
        )
        == []
    )
    half = exported["half"]
    ours, stock = (torch.load(path, weights_only=True)["model"] for path in (half.run.path(5), half.path))
    same = {key for key, value in stock.items() if value.equal(ours[key])}
    assert {key for key in stock if "_proj" in key or "norm" in key or "bias" in key} <= same
    assert {view.name for view in views_of(half.run.model) if view.rule.stage in ("ffn", "emb")}.isdisjoint(
        same
    )
    embedding = stock["encoder.sentence_encoder.embed_tokens.weight"]
    assert embedding.equal(stock["encoder.lm_head.weight"]), "tied"


def test_fairseq_trains_on_from_it(exported: dict[str, Pair], data, tmp_path: Path) -> None:
    """With its optimizer, schedule and iterator: nothing is reset."""
    run = train(tmp_path, data.lm, STOCK, {"--restore-file": exported["unfrozen"].path, "--max-update": 8})
    assert [int(figures["num_updates"]) for figures in run.logged()] == [6, 7, 8]
    steps = {int(parameter["step"]) for parameter in run.state()["last_optimizer_state"]["state"].values()}
    assert steps == {8}


def test_a_stock_checkpoint_loads_strictly(data, tmp_path: Path, tokens: torch.Tensor) -> None:
    """fairseq's trainer restores with strict=True; then the recipe's stages run as ever."""
    stock = train(tmp_path / "stock", data.lm, STOCK, {"--max-update": 3})
    start: dict = {}

    def watch(trainer) -> None:
        original = trainer.load_checkpoint

        def load(*args, **kwargs):
            extra = original(*args, **kwargs)
            with torch.no_grad():
                start["logits"] = trainer.model.eval()(tokens)[0]
            return extra

        trainer.load_checkpoint = load

    options = {"--restore-file": stock.path(3), "--max-update": 4, "--quant-stage-updates": "1,2,3"}
    options["--quant-recipe"] = write_recipe(tmp_path / "r.yaml", recipe())
    ours = train(tmp_path / "ours", data.lm, MLM, options, RESETS, watch=watch)
    with torch.no_grad():
        assert start["logits"].equal(stock.model(tokens)[0])
    assert ours.logged()[-1]["qn_frozen_share"] == 1


def test_a_stock_checkpoint_is_not_exported(data, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train(tmp_path / "stock", data.lm, STOCK, {"--max-update": 1})
    assert (
        main(
            ["export-fairseq", str(tmp_path / "stock" / "checkpoint_last.pt"), "-o", str(tmp_path / "x.pt")]
        )
        == 1
    )
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "stock" in error
    assert not (tmp_path / "x.pt").exists()


def test_a_full_disk_loses_nothing(
    exported: dict[str, Pair],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """One line, the old file, and nothing left beside it."""

    def save(state: object, file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    (tmp_path / "old.pt").write_bytes(b"old")
    source = exported["half"].run.folder / "checkpoint_last.pt"
    assert main(["export-fairseq", str(source), "-o", str(tmp_path / "old.pt")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt"]
    assert (tmp_path / "old.pt").read_bytes() == b"old"
