"""qn_sentence_prediction: heads in the recipe, fine-tuning from pre-trained checkpoints of other recipes,
reload, resume.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq_run import (
    CLASSES,
    EACH,
    MLM,
    RESETS,
    VALUES,
    Run,
    build,
    differing,
    recipe,
    train,
    write_recipe,
)

import fairseq_qn
from fairseq_qn.cli import main
from fairseq_qn.errors import MismatchError
from fairseq_qn.hub import QNRobertaModel
from fairseq_qn.modules.view import FROZEN, views_of

HEADS = r"classification_heads\..*\.(dense|out_proj)"
STAGED = {"--quant-stage-updates": "2,3,5", "--max-update": 7}


def with_heads(block_size: int = 8) -> dict:
    content = recipe(block_size=block_size)
    content["rules"].append(
        {"layers": HEADS, "scheme": "product", "n_centroids": 16, "block_size": 4, "stage": "attn"}
    )
    return content


@pytest.fixture(scope="module")
def pretrained(data, tmp_path_factory) -> dict[str, Run]:
    """Masked LMs of a recipe with blocks of 8: one not frozen, one wholly frozen."""
    folder = tmp_path_factory.mktemp("pretrained")
    options = {"--quant-recipe": write_recipe(folder / "r.yaml", recipe()), "--max-update": 4}
    stages = {"noisy": {}, "frozen": {"--quant-stage-updates": "1,2,3"}}
    return {name: train(folder / name, data.lm, MLM, options, more) for name, more in stages.items()}


@pytest.fixture(scope="module")
def tuned(data, pretrained, tmp_path_factory) -> Run:
    """Fine-tuned from the noisy one with blocks of 4 in place of 8, the head quantised in the last stage."""
    folder = tmp_path_factory.mktemp("tuned")
    options = {
        "--restore-file": pretrained["noisy"].path(4),
        "--quant-recipe": write_recipe(folder / "r.yaml", with_heads(4)),
    }
    return train(folder, data.classes, CLASSES, STAGED, EACH, options, RESETS)


@pytest.fixture(scope="module")
def tokens(data) -> torch.Tensor:
    return build(data.classes, CLASSES).sample["net_input"]["src_tokens"]


def predict(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(
            tokens, features_only=True, classification_head_name="sentence_classification_head"
        )[0]


def test_pretrained_weights_come_along(pretrained: dict[str, Run], data, tmp_path: Path) -> None:
    """Blocks of another size, and a head that the checkpoint lacks, are no obstacle while nothing is
    frozen.
    """
    options = {
        "--restore-file": pretrained["noisy"].path(4),
        "--lr": 0,
        "--end-learning-rate": 0,
        "--max-update": 1,
    }
    run = train(
        tmp_path,
        data.classes,
        CLASSES,
        options,
        RESETS,
        {"--quant-recipe": write_recipe(tmp_path / "r.yaml", with_heads(4))},
    )
    before, after = pretrained["noisy"].at(4)["model"], run.at(1)["model"]
    shared = [key for key in before if not key.endswith(("codes", "phase", "digest"))]
    assert differing({key: before[key] for key in shared}, {key: after[key] for key in shared}) == []
    assert (
        before["encoder.sentence_encoder.layers.0.fc1.codes"].shape
        != after["encoder.sentence_encoder.layers.0.fc1.codes"].shape
    )


def test_the_head_is_quantised_with_its_stage(tuned: Run) -> None:
    heads = [view for view in views_of(tuned.model) if view.name.startswith("classification_heads")]
    assert [view.name.split(".")[-2] for view in heads] == ["dense", "out_proj"]
    assert all(view.phase == FROZEN for view in heads)
    assert {int(v) for k, v in tuned.at(5)["model"].items() if "heads" in k and k.endswith("phase")} == {0}
    for view in heads:
        assert len(view.home.weight.reshape(-1, 4).unique(dim=0)) <= 16
    assert tuned.logged("valid")[-1]["valid_accuracy"] >= 0


def test_reload_gives_the_same_logits(tuned: Run, tokens: torch.Tensor, tmp_path: Path) -> None:
    """By fairseq's own loader, and from the small file."""
    expected = predict(tuned.model, tokens)
    path = tuned.folder / "checkpoint_last.pt"
    (model,), _, _ = checkpoint_utils.load_model_ensemble_and_task([str(path)])
    assert predict(model, tokens).equal(expected)
    small = tmp_path / "x.qn.safetensors"
    assert main(["compress", str(path), "-o", str(small), "--parts", "float32"]) == 0
    for mode in ("dense", "packed"):
        assert torch.allclose(predict(fairseq_qn.load(small, mode), tokens), expected, atol=1e-6), mode


@pytest.mark.parametrize("update", [2, 5, 6])
def test_resume_is_bit_identical(update: int, tuned: Run, data, tmp_path: Path) -> None:
    """Before, at and after the boundary at which the head is frozen."""
    options = {
        "--restore-file": tuned.path(update),
        "--quant-recipe": write_recipe(tmp_path / "r.yaml", with_heads(4)),
    }
    resumed = train(tmp_path, data.classes, CLASSES, STAGED, options).state()
    for key in ("model", "last_optimizer_state"):
        assert differing(tuned.at(7)[key], resumed[key]) == []


def test_from_a_frozen_checkpoint(pretrained: dict[str, Run], data, tmp_path: Path) -> None:
    """What was frozen stays frozen under its codes, and only the head is left to be learned."""
    options = {
        "--restore-file": pretrained["frozen"].path(4),
        "--quant-recipe": write_recipe(tmp_path / "r.yaml", with_heads()),
    }
    run = train(
        tmp_path,
        data.classes,
        CLASSES,
        {"--quant-stage-updates": "1,1,2", "--max-update": 4},
        options,
        RESETS,
    )
    before, after = pretrained["frozen"].at(4)["model"], run.at(4)["model"]
    codes = [key for key in before if key.endswith(("codes", "phase", "digest"))]
    assert len(codes) > 20
    assert differing({key: before[key] for key in codes}, {key: after[key] for key in codes}) == []
    assert all(view.phase == FROZEN for view in views_of(run.model))
    frozen = [text for _, text in run.lines if "stage attn frozen" in text]
    assert len(frozen) == 1 and "frozen: 2 layers" in frozen[0]


def test_a_frozen_layer_under_another_recipe_is_an_error(
    pretrained: dict[str, Run], data, tmp_path: Path
) -> None:
    options = {
        "--restore-file": pretrained["frozen"].path(4),
        "--quant-recipe": write_recipe(tmp_path / "r.yaml", with_heads(4)),
    }
    with pytest.raises(Exception, match="Cannot load model parameters") as error:
        train(tmp_path, data.classes, CLASSES, {"--max-update": 4}, options, RESETS)
    cause = error.value.__context__
    assert isinstance(cause, MismatchError) and "weight: frozen in the checkpoint" in str(cause)


def test_a_checkpoint_without_a_recipe_takes_one(data, tmp_path: Path, tokens: torch.Tensor) -> None:
    """Trained by the qn_ names alone; the recipe is given when it is compressed, heads included."""
    run = train(tmp_path / "run", data.classes, CLASSES, {"--max-update": 2})
    small = tmp_path / "x.qn.safetensors"
    words = ["--recipe", str(write_recipe(tmp_path / "r.yaml", with_heads())), "-o", str(small)]
    assert main(["compress", str(run.path(2)), *words]) == 0
    layers = fairseq_qn.inspect(small)["layers"]
    assert {name for name in layers if name.startswith("classification_heads")} == {
        f"classification_heads.sentence_classification_head.{part}.weight" for part in ("dense", "out_proj")
    }
    assert predict(fairseq_qn.load(small), tokens).shape == predict(run.model, tokens).shape


def test_regression(data, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """--regression-target reaches the wrapped criterion, and the file answers with the number, not with a
    class.
    """
    options = {**VALUES, "--max-update": 30, "--lr": 5e-3}
    options |= {
        "--quant-stage-updates": "10,12,14",
        "--quant-recipe": write_recipe(tmp_path / "r.yaml", recipe()),
    }
    run = train(tmp_path / "run", data.values, options)
    losses = [figures["loss"] for figures in run.logged()]
    assert losses[-1] < losses[0] / 2
    small = tmp_path / "x.qn.safetensors"
    words = [
        "-o",
        str(small),
        "--bpe",
        "sentencepiece",
        "--bpe-files",
        str(data.pieces),
        "--parts",
        "float32",
    ]
    assert main(["compress", str(run.folder / "checkpoint_last.pt"), *words]) == 0
    capsys.readouterr()
    assert main(["predict", str(small), "ka lo", "--json"]) == 0
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    hub = QNRobertaModel.from_pretrained(small)
    assert float(answer["text"]) == pytest.approx(
        float(predict(run.model, hub.encode("ka lo")[None])), abs=1e-4
    )
    assert answer["score"] is None
