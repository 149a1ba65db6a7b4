"""qn_transformer_lm and qn_transformer, tables tied: noise, stages, fairseq's own tools, the small file and
its hub.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_run import LANGUAGE, PAIRS, Run, evaluate, recipe, sentences, train, write_recipe

import fairseq_qn
from fairseq_qn.api import recipe_of
from fairseq_qn.cli import main
from fairseq_qn.models.transformer import QNTransformerLanguageModel, QNTransformerModel
from fairseq_qn.modules.view import FROZEN, views_of

STAGED = {"--quant-stage-updates": "20,25,30", "--max-update": 40, "--lr": 1e-2}
SEPARATE = {k: v for k, v in PAIRS.items() if k != "--share-all-embeddings"} | {
    "--share-decoder-input-output-embed": None
}
KINDS = {"lm": ("lm", LANGUAGE), "shared": ("pairs", PAIRS), "separate": ("pairs", SEPARATE)}
TABLES = {"lm": 1, "shared": 1, "separate": 2}
LINES = sentences(5, 9)


@dataclass
class Made:
    kind: str
    data: Any
    run: Run
    small: Path

    @property
    def checkpoint(self) -> Path:
        return self.run.folder / "checkpoint_last.pt"

    @property
    def model_class(self) -> Any:
        return QNTransformerLanguageModel if self.kind == "lm" else QNTransformerModel

    def trained(self) -> Any:
        """fairseq's interface over the frozen training checkpoint."""
        folder = KINDS[self.kind][0]
        bpe = {"bpe": "sentencepiece", "sentencepiece_model": str(self.data.pieces)}
        path = str(getattr(self.data, folder))
        return self.model_class.from_pretrained(
            str(self.run.folder), "checkpoint_last.pt", data_name_or_path=path, **bpe
        ).eval()


@pytest.fixture(scope="module", params=KINDS)
def made(request, data, tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp(request.param)
    source, options = KINDS[request.param]
    path = write_recipe(folder / "r.yaml", recipe())
    run = train(folder, getattr(data, source), options, STAGED, {"--quant-recipe": path})
    small = folder / "model.qn.safetensors"
    words = ["--bpe", "sentencepiece", "--bpe-files", str(data.pieces), "--parts", "float32"]
    assert main(["compress", str(folder / "checkpoint_last.pt"), "-o", str(small), *words]) == 0
    return Made(request.param, data, run, small)


def test_trained_and_frozen(made: Made) -> None:
    losses = [figures["loss"] for figures in made.run.logged()]
    assert losses[-1] < losses[0] - 0.3, "it learns, noise and stages and all"
    views = list(views_of(made.run.model))
    assert all(view.phase == FROZEN for view in views)
    assert sum("embed_tokens" in view.name for view in views) == TABLES[made.kind]
    assert made.run.logged()[-1]["qn_frozen_share"] == 1
    decoder = made.run.model.decoder
    assert decoder.output_projection.weight.equal(decoder.embed_tokens.weight), "tied through the view"
    assert not decoder.output_projection.weight.equal(decoder.embed_tokens.get_parameter("weight"))


def test_a_stock_export_holds_no_buffers_of_views(made: Made, tmp_path: Path) -> None:
    """Under no name: fairseq's shared embeddings are one module under two."""
    assert main(["export-fairseq", str(made.checkpoint), "-o", str(tmp_path / "stock.pt")]) == 0
    keys = torch.load(tmp_path / "stock.pt", weights_only=True)["model"]
    assert keys and not [key for key in keys if key.endswith((".codes", ".phase", ".digest"))]


def test_the_file_holds_a_tied_table_once(made: Made) -> None:
    content = fairseq_qn.inspect(made.small)
    tables = [name for name in content["layers"] if "embed_tokens" in name]
    assert len(tables) == TABLES[made.kind]
    assert any("decoder.output_projection.weight" in tie for tie in content["ties"])
    assert content["size"]["total"] == made.small.stat().st_size


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_the_interface_answers_as_the_training_model(made: Made, mode: str) -> None:
    ours, theirs = made.model_class.from_pretrained(made.small, mode=mode), made.trained()
    if made.kind == "lm":
        ours_say, theirs_say = (
            [hub.sample(line, beam=3, max_len_b=12) for line in LINES] for hub in (ours, theirs)
        )
    else:
        ours_say, theirs_say = ([hub.translate(line, beam=3) for line in LINES] for hub in (ours, theirs))
    assert ours_say == theirs_say
    assert all(isinstance(text, str) and text for text in ours_say)
    tokens = [ours.encode(line) for line in LINES]
    assert all(a.equal(theirs.encode(line)) for a, line in zip(tokens, LINES))
    if made.kind == "lm":
        for a, b in zip(ours.score(LINES), theirs.score(LINES)):
            assert torch.allclose(a["positional_scores"], b["positional_scores"], atol=1e-5)
            assert float(a["score"]) < 0 and len(a["positional_scores"]) > 4
    else:
        for many, others in zip(ours.generate(tokens, beam=3), theirs.generate(tokens, beam=3)):
            scores = [torch.stack([hypothesis["score"] for hypothesis in found]) for found in (many, others)]
            assert torch.allclose(*scores, atol=1e-4)


def test_predict(made: Made, capsys: pytest.CaptureFixture) -> None:
    """The command line answers with what the interface says."""
    capsys.readouterr()
    assert main(["predict", str(made.small), *LINES[:2], "--json", "--beam", "3"]) == 0
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    hub = made.model_class.from_pretrained(made.small)
    assert [row["answers"][0]["text"] for row in rows] == hub.translate(LINES[:2], beam=3)


def test_predict_answers_around_a_line_that_is_too_long(made: Made, capsys: pytest.CaptureFixture) -> None:
    capsys.readouterr()
    assert main(["predict", str(made.small), "ka " * 2000, "", LINES[0], "--json"]) == 1
    said = capsys.readouterr()
    assert [json.loads(row)["input"] for row in said.out.splitlines()] == ["", LINES[0]]
    assert said.err.count("\n") == 1 and "sentence 1: expected up to" in said.err


def test_half_precision_parts(made: Made, tmp_path: Path) -> None:
    """The default file: scores to 1e-3."""
    small = tmp_path / "half.qn.safetensors"
    assert main(["compress", str(made.checkpoint), "-o", str(small)]) == 0
    assert small.stat().st_size < made.small.stat().st_size
    models = [fairseq_qn.load(path) for path in (small, made.small)]
    tokens = torch.randint(4, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    inputs = (tokens,) if made.kind == "lm" else (tokens, torch.full((3,), 9), tokens)
    with torch.no_grad():
        logits = [model(*inputs)[0] for model in models]
    assert float((logits[0] - logits[1]).abs().max()) < 1e-2 * float(logits[1].std())


def test_fairseqs_own_evaluation(made: Made) -> None:
    """fairseq-eval-lm and fairseq-generate, which take the task of their command line, score every token and
    sentence.
    """
    if made.kind != "lm":
        score = evaluate_pairs(made)
        assert len(score) == 24 and all(-20 < value < 0 for value in score.values())
        return
    words = [
        made.data.lm,
        {"--path": made.checkpoint, "--task": "qn_language_modeling", "--gen-subset": "valid"},
    ]
    words += [
        {"--batch-size": 8, "--tokens-per-sample": 32, "--sample-break-mode": "none", "--num-workers": 0}
    ]
    result, lines, _ = evaluate("fairseq-eval-lm", words)
    (counted,) = (re.search(r"Evaluated ([\d,]+) tokens", text) for _, text in lines if "Evaluated" in text)
    text = (made.data.root / "valid.src").read_text()
    assert int(counted.group(1).replace(",", "")) == len(text.split()) + text.count("\n"), (
        "every token and end of line"
    )
    assert result["loss"] == pytest.approx(made.run.logged("valid")[-1]["valid_loss"], abs=2e-3)


def evaluate_pairs(made: Made) -> dict[str, float]:
    """Sentence number -> score of its best hypothesis, from fairseq-generate; also that the hub says the
    same.
    """
    words = [
        made.data.pairs,
        {"--path": made.checkpoint, "--task": "qn_translation", "--gen-subset": "valid", "--beam": 3},
    ]
    words += [{"--batch-size": 8, "--num-workers": 0, "--remove-bpe": "sentencepiece", "--scoring": "bleu"}]
    _, lines, printed = evaluate("fairseq-generate", words)
    assert any("Translated 24 sentences" in text for _, text in lines)
    best = {row.split("\t")[0]: row.split("\t")[1:] for row in printed if row.startswith("D-")} or {
        row.split("\t")[0]: row.split("\t")[1:] for row in printed if row.startswith("H-")
    }
    source = sentences(24, 2)
    hub = made.model_class.from_pretrained(made.small)
    for number in (0, 7, 23):
        (hypothesis,) = (value for key, value in best.items() if key.endswith(f"-{number}"))
        assert hub.translate(source[number], beam=3) == hypothesis[1]
    return {key: float(value[0]) for key, value in best.items()}


def test_a_stock_checkpoint_is_compressed(made: Made, data, tmp_path: Path) -> None:
    """Trained by fairseq's own names; the recipe comes with the compression."""
    source, options = KINDS[made.kind]
    stock = {k: v for k, v in options.items() if k != "--wrapped-criterion"} | {
        "--criterion": "cross_entropy"
    }
    stock |= {key: options[key].removeprefix("qn_") for key in ("--task", "--arch")}
    train(tmp_path, getattr(data, source), stock, {"--max-update": 2})
    small = tmp_path / "x.qn.safetensors"
    words = ["--recipe", str(tmp_path / "r.yaml"), "-o", str(small)]
    write_recipe(tmp_path / "r.yaml", recipe())
    assert main(["compress", str(tmp_path / "checkpoint_last.pt"), *words]) == 0
    model = fairseq_qn.load(small)
    assert isinstance(model, made.model_class) and recipe_of(model) is None
