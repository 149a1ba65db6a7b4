"""What an installation holds: the package, the configs inside it, the Hydra plugin and the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

from fairseq_qn.config_dir import config_dir

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, so that no build folder is left in it."""
    tree = tmp_path_factory.mktemp("tree")
    copied = "fairseq_qn configs setup.py README.md LICENSE".split()
    subprocess.run(["cp", "-r", *[str(ROOT / name) for name in copied], str(tree)], check=True)
    command = "-m pip wheel -q --no-deps --no-index --no-build-isolation --use-pep517 -w out .".split()
    subprocess.run([sys.executable, *command], cwd=tree, check=True, capture_output=True, text=True)
    (path,) = (tree / "out").glob("fairseq_qn-*.whl")
    return path


def test_wheel_holds_package_configs_and_plugin(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "fairseq_qn").rglob("*.py")}
    plugin = {p for p in sources if p.startswith("fairseq_qn/hydra_plugins/")}
    assert sources - plugin <= names
    assert "fairseq_qn/py.typed" in names
    assert plugin
    assert {p.removeprefix("fairseq_qn/") for p in plugin} <= names, "the plugin has to be where Hydra looks"
    assert not plugin & names, "the plugin is there twice"
    configs = {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.yaml")}
    assert {f"fairseq_qn/{p}" for p in configs} <= names
    assert "hydra_plugins/__init__.py" not in names, (
        "an __init__.py here would hide other distributions' plugins"
    )


def test_configs_are_found_in_an_installation(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "from fairseq_qn.config_dir import config_dir; print(config_dir())"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert Path(done.stdout.strip()) == tmp_path / "fairseq_qn" / "configs"
    assert config_dir() == ROOT / "configs"


def test_another_python_is_refused_in_a_line(tmp_path: Path) -> None:
    """The one that is named, with no other tried in its place."""
    python = tmp_path / "python3.10"
    python.write_text("#!/bin/sh\n[ $1 = -V ] && echo Python 3.10.13\n")
    python.chmod(0o755)
    (tmp_path / "run_scripts").mkdir()
    for name in ("setup.sh", "tested-versions.txt"):
        shutil.copy(ROOT / "run_scripts" / name, tmp_path / "run_scripts")
    done = subprocess.run(
        ["bash", "run_scripts/setup.sh"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHON": str(python)},
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / ".venv").exists()
    assert done.stderr.count("\n") == 1, done.stderr
    assert "needs Python 3.11 (which is tested) or later, with venv; found Python 3.10.13." in done.stderr


def test_command_and_extras() -> None:
    this = distribution("fairseq-qn")
    scripts = {e.name: e.value for e in this.entry_points if e.group == "console_scripts"}
    assert scripts == {"fairseq-qn": "fairseq_qn.cli:main"}
    assert set(this.metadata.get_all("Provides-Extra")) == {
        "all", "ans", "benchmark", "hf", "hub", "oracle", "plot", "tensorboard", "test",
    }  # fmt: skip


@pytest.mark.parametrize("loaded", ["fairseq", "json"])
def test_plugin_registers_beside_fairseq_only(loaded: str, tmp_path: Path) -> None:
    """In a program that uses fairseq, composing finds fairseq_qn; in another Hydra program, nothing is
    imported.
    """
    code = f"""
import sys, {loaded}
from hydra import compose, initialize_config_dir
with initialize_config_dir({str(tmp_path)!r}, version_base=None):
    compose(overrides=[])
print("hydra_plugins.fairseq_qn" in sys.modules, "fairseq_qn" in sys.modules, "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    yes = str(loaded == "fairseq")
    assert done.stdout.split()[-3:] == ["True", yes, yes]
