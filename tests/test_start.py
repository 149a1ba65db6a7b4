"""What a fresh process loads, and that fairseq finds the plug-in in whatever order the two are imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch._C", "fairseq", "numpy.linalg", "omegaconf", "tqdm", "safetensors")
GOLDEN = Path(__file__).parent / "artifact" / "data" / "version_2.qn.safetensors"
RULE = "version: 1\nrules: [{layers: a, scheme: product, block_siz: 4}]\n"


def fresh(code: str, cwd: Path) -> str:
    """Standard output of a program of its own."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(words: list[str], cwd: Path) -> tuple[int, list[str]]:
    """(exit status, those of HEAVY that were loaded) of one call of fairseq-qn."""
    code = f"""
import json, sys
from fairseq_qn.cli import main
sys.argv = ["fairseq-qn", *{words!r}]
try:
    status = main()
except SystemExit as stop:
    status = stop.code
print()
print(json.dumps([status, [name for name in {HEAVY!r} if name in sys.modules]]))
"""
    status, loaded = json.loads(fresh(code, cwd).splitlines()[-1])
    return status, loaded


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--help"], 0),
        (["compress", "--help"], 0),
        (["--version"], 0),
        (["compress"], 2),
        (["no-such-command"], 2),
        (["recipes"], 0),
        (["user-dir", "--json"], 0),
        (["inspect", str(GOLDEN)], 0),
        (["inspect", str(GOLDEN), "--json"], 0),
        (["inspect", "wrong.yaml"], 1),
        (["compress", "model.pt", "-o", "x", "--recipe", "nosuch"], 1),
        (["compress", "model.pt", "-o", "x", "--recipe", "wrong.yaml"], 1),
        (["train", "--model", "m", "--train", "t", "--valid", "v", "-o", "x", "--recipe", "wrong.yaml"], 1),
    ],
)
def test_what_needs_no_model_loads_none(words: list[str], status: int, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(RULE)
    assert loaded_by(words, tmp_path) == (status, [])


@pytest.mark.parametrize("first", ["from torch import nn", "import torch.utils.data", "torch.nn"])
def test_a_postponed_module_is_the_module(first: str, tmp_path: Path) -> None:
    """torch fills in place, by an attribute or by the import of a part of it, and is then as ever."""
    code = f"""
import json, pickle, sys
from fairseq_qn.lazy_import import postpone
postpone("torch", "numpy", "no_such_module", "json")
import torch as before
import torch
assert "torch._C" not in sys.modules and "no_such_module" not in sys.modules and sys.modules["json"] is json
{first}
import torch
from torch.nn import Linear
assert before is torch is sys.modules["torch"] and type(torch) is type(sys) and torch.__path__
assert torch.nn.Linear is Linear and not hasattr(torch, "no_such_name")
assert pickle.loads(pickle.dumps(Linear(2, 2)))(torch.ones(2)).detach().numpy().shape == (2,)
"""
    fresh(code, tmp_path)


def test_a_postponed_module_that_fails(tmp_path: Path) -> None:
    """It fails as the import would have, each time."""
    (tmp_path / "failing.py").write_text("raise ImportError('not today')")
    code = """
import sys
from fairseq_qn.lazy_import import postpone
postpone("failing")
for _ in range(2):
    try:
        from failing import name
    except ImportError as error:
        assert str(error) == "not today" and "failing" not in sys.modules
    else:
        raise AssertionError
"""
    fresh(code, tmp_path)


def test_fairseq_without_scikit_learn(tmp_path: Path) -> None:
    """The program leaves out what fairseq needs it for, until that is asked for."""
    code = """
import sys
from fairseq_qn.cli import LATER
from fairseq_qn.lazy_import import postpone
postpone(*LATER)
import fairseq_qn.hub
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.tasks import TASK_REGISTRY
assert "qn_sentence_prediction" in TASK_REGISTRY and "quantization_aware" in CRITERION_REGISTRY
assert not {"sklearn", "scipy"} & {*sys.modules} and "sentence_prediction" not in CRITERION_REGISTRY
from fairseq.criterions.sentence_prediction import SentencePredictionCriterion as criterion
assert CRITERION_REGISTRY["sentence_prediction"] is criterion and "sklearn" in sys.modules
"""
    fresh(code, tmp_path)


def test_a_package_whose_modules_are_postponed(tmp_path: Path) -> None:
    """Each module right below it, not those further down, and not the package."""
    package = tmp_path / "package"
    for name in ("", "one", "two", "two/three"):
        folder = package / name if name != "one" else package
        folder.mkdir(exist_ok=True)
        (folder / ("one.py" if name == "one" else "__init__.py")).write_text(f"print({name!r})\nvalue = 1\n")
    code = """
from fairseq_qn.lazy_import import postpone
postpone("package.*")
import package.one, package.two
print("empty")
import package.two.three
from package.one import value
"""
    assert fresh(code, tmp_path).split("\n") == ["", "empty", "two", "two/three", "one", ""]


def test_another_program_keeps_its_imports(tmp_path: Path) -> None:
    """main with words of its own, in a program that may go on with torch and fairseq."""
    code = f"""
import sys
from fairseq_qn.cli import main
before = [*sys.meta_path]
assert main(["inspect", {str(GOLDEN)!r}]) == 0 and sys.meta_path == before and "torch._C" in sys.modules
"""
    fresh(code, tmp_path)


def test_a_name_is_loaded_when_it_is_asked_for(tmp_path: Path) -> None:
    code = """
import sys, fairseq_qn
assert "torch" not in sys.modules
assert {"apply", "Recipe", "load"} <= {*dir(fairseq_qn)}
from fairseq_qn import Recipe
assert fairseq_qn.load is fairseq_qn.api.load and Recipe is fairseq_qn.recipe.Recipe
assert all(getattr(fairseq_qn, name) for name in fairseq_qn.__all__)
assert not hasattr(fairseq_qn, "unheard_of") and "fairseq" not in sys.modules
"""
    fresh(code, tmp_path)


@pytest.mark.parametrize(
    "imports",
    [
        "import fairseq_qn, fairseq",
        "import fairseq, fairseq_qn",
        "import fairseq_qn, importlib.util; importlib.util.find_spec('fairseq'); import fairseq.models",
        "from fairseq_qn.hub import QNRobertaModel",
        "from fairseq_qn.tasks.quantised import QuantisedTask",
        "import fairseq_qn.criterions.options",
    ],
)
def test_fairseq_knows_the_plugin_in_any_order(imports: str, tmp_path: Path) -> None:
    code = f"""
{imports}
from argparse import Namespace
import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.models import MODEL_REGISTRY
from fairseq.tasks import TASK_REGISTRY
assert "qn_masked_lm" in TASK_REGISTRY and "qn_roberta" in MODEL_REGISTRY
assert "quantization_aware" in CRITERION_REGISTRY
assert Namespace in torch.serialization.get_safe_globals()
import fairseq_qn.plugin
fairseq_qn.plugin.attach()  # once more does nothing
"""
    fresh(code, tmp_path)
