"""The stock `fairseq-hydra-train` knows the qn_ names as group choices, without user_dir, by the Hydra
plugin.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
COMMAND = Path(sys.executable).with_name("fairseq-hydra-train")


def composed(cwd: Path, *overrides: str) -> dict:
    """The configuration that the stock command composes, without training."""
    done = subprocess.run(
        [str(COMMAND), *overrides, "--cfg", "job"],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Error importing" not in done.stderr
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize("task", ["qn_masked_lm", "qn_sentence_prediction"])
def test_group_choice(task: str, tmp_path: Path) -> None:
    groups = [f"task={task}", "criterion=quantization_aware", "model=transformer_lm"]
    config = composed(tmp_path, *groups, "task.quant_recipe=recipe.yaml", "task.data=bin")
    assert config["task"]["_name"] == task
    assert config["task"]["quant_recipe"] == "recipe.yaml"
    assert config["task"]["data"] == "bin"
    assert config["criterion"]["_name"] == "quantization_aware"
    assert config["model"]["_name"] == "transformer_lm", "fairseq's own groups stay"


def test_unknown_choice_still_fails(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="qn_no_such_task"):
        composed(tmp_path, "task=qn_no_such_task")


def test_user_dir_after_the_plugin(tmp_path: Path) -> None:
    """common.user_dir, read after the plugin has imported the package, is taken as the same package."""
    code = f"""
from argparse import Namespace
import fairseq, sys
from fairseq.utils import import_user_module
import hydra_plugins.fairseq_qn as plugin
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
plugin.FairseqQNSearchPath().manipulate_search_path(ConfigSearchPathImpl())
first = sys.modules["fairseq_qn"]
import_user_module(Namespace(user_dir={str(ROOT / "fairseq_qn")!r}))
print(sys.modules["fairseq_qn"] is first)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("True")
