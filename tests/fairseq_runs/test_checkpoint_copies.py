"""A kill while fairseq copies a checkpoint leaves whole files only, and the same command goes on to the same
end.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.file_io import PathManager
from fairseq_run import EACH, MLM, PLUGIN, ROOT, Run, arguments, differing, train

from fairseq_qn.tasks import patches

# Stops for good in the middle of the copy to a name, however copies are made: shutil.copyfile is fairseq's
# own way.
KILLING = """
import os, shutil, signal, sys
import torch; torch.set_num_threads(1)
import fairseq_qn
name, at = os.environ["KILL_AT"].split(":")
found = []
def half(source, target):
    data = source.read()
    target.write(data[:len(data) // 2]); target.flush()
    os.kill(os.getpid(), signal.SIGKILL)
def due(path):
    found.append(os.path.basename(path) == name)
    return found.count(True) == int(at)
copyfile, copyfileobj = shutil.copyfile, shutil.copyfileobj
replacing = fairseq_qn.tasks.patches.replacing
def by_name(source, target, **rest):
    if due(target):
        with open(source, "rb") as a, open(target, "wb") as b: half(a, b)
    return copyfile(source, target, **rest)
def beside(path):
    if due(path): shutil.copyfileobj = lambda a, b, *rest: half(a, b)
    return replacing(path)
shutil.copyfile, fairseq_qn.tasks.patches.replacing = by_name, beside
from fairseq_cli import train; train.cli_main()
"""


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> tuple[Run, list[str]]:
    """A run that was not killed, and its words; without a recipe each checkpoint may be the best."""
    words = arguments(str(data.lm), MLM, {"--max-update": 4}, EACH)
    return train(tmp_path_factory.mktemp("straight"), words), words


@pytest.mark.parametrize("name", ["checkpoint_last.pt", "checkpoint_best.pt"])
def test_killed_inside_the_copy(name: str, straight: tuple[Run, list[str]], tmp_path: Path) -> None:
    run, words = straight
    folder = tmp_path / "killed"
    call = [
        sys.executable,
        "-c",
        KILLING,
        *words,
        *arguments({"--save-dir": folder, "--cpu": None, "--user-dir": PLUGIN}),
    ]
    env = {**os.environ, "KILL_AT": f"{name}:2"}
    done = subprocess.run(call, cwd=ROOT, env=env, capture_output=True, timeout=300, check=False)
    assert done.returncode == -9, done.stderr[-2000:]
    for path in folder.glob("*.pt"):
        torch.load(path, weights_only=True)  # whole
    assert torch.load(folder / name, weights_only=True)["optimizer_history"][-1]["num_updates"] == 1
    (left,) = folder.glob(".*.qn-tmp")
    assert left.stat().st_size < (folder / name).stat().st_size
    resumed = train(folder, words)
    assert differing(run.state()["model"], resumed.state()["model"]) == []
    assert not [*folder.glob(".*")], "the next copy to the name swept what was left"


def test_only_the_copies_of_checkpoints_change(tmp_path: Path) -> None:
    assert checkpoint_utils.PathManager is patches._PathManager and PathManager is not patches._PathManager
    (tmp_path / "a").write_bytes(b"new" * 1000)
    (tmp_path / "b").write_bytes(b"old")
    (tmp_path / "link").symlink_to("b")
    copies = [
        threading.Thread(
            target=checkpoint_utils.PathManager.copy,
            args=(str(tmp_path / "a"), str(tmp_path / "link"), True),
        )
        for _ in range(8)
    ]
    for copy in copies:
        copy.start()
    for copy in copies:
        copy.join()
    assert (tmp_path / "b").read_bytes() == b"new" * 1000 and sorted(os.listdir(tmp_path)) == [
        "a",
        "b",
        "link",
    ]
    with pytest.raises(OSError, match="cannot write"):
        checkpoint_utils.PathManager.copy(str(tmp_path / "a"), str(tmp_path / "none" / "b"), overwrite=True)
