"""What newcomers get wrong in a fairseq-train command is said in a line before it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fairseq_run import CLASSES, MLM, build, listening, recipe, write_recipe

from fairseq_qn import api
from fairseq_qn.errors import MismatchError, NoLayerMatched, QNError, RecipeError, UnsupportedError

TEACHER = "no teacher, so they do nothing; add --teacher-checkpoint FILE"
STAGES = "this training freezes nothing"
TOKEN = "add --init-token 0"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"--distill-weight": 0.7}, {TEACHER, STAGES}),
        ({"--distill-temperature": 2, "--quant-stage-updates": "1,2,3"}, {TEACHER}),
        ({"--quant-stage-epochs": "1,2,3", "--init-token": None}, {TOKEN}),
        ({"--quant-stage-epochs": "1,2,3"}, set()),
    ],
)
def test_what_is_forgotten(options: dict[str, Any], said: set[str], data, tmp_path: Path) -> None:
    given = {**CLASSES, "--quant-recipe": write_recipe(tmp_path / "r.yaml", recipe()), **options}
    if options.get("--init-token", 0) is None:
        del given["--init-token"]
    lines: list[tuple[str, str]] = []
    with listening(lines):
        build(data.classes, given)
    text = "\n".join(message for _, message in lines)
    assert {part for part in (TEACHER, STAGES, TOKEN) if part in text} == said


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"--num-classes": 5}, MismatchError, r"has 2 labels \(early, late\); give --num-classes 2"),
        ({"--quant-recipe": "no_such"}, RecipeError, "nor a ready recipe; those are .*roberta"),
        ({"--quant-recipe": "wrong.yaml"}, NoLayerMatched, "no_such_layer"),
        ({"--quant-recipe": "roberta", "--arch": "roberta"}, UnsupportedError, "--arch qn_roberta$"),
    ],
)
def test_what_is_wrong(
    options: dict[str, Any], error: type[QNError], said: str, data, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wrong = recipe()
    wrong["rules"][0]["layers"] = r".*\.no_such_layer"
    write_recipe(tmp_path / "wrong.yaml", wrong)
    with pytest.raises(error, match=said):
        build(data.classes, {**CLASSES, **options})


def test_a_ready_recipe_by_name(data, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = build(data.lm, MLM, {"--quant-recipe": "roberta"}).model
    assert [stage.name for stage in api.recipe_of(model).stages] == ["ffn", "emb", "attn"]
