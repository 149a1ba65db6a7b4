"""Every code block of the README runs, in its order, in one folder, on tiny files of the names that it uses.

What it says of sizes and lengths is cut down, by CUT; set-up, quickstart and the test command run elsewhere.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from labelled import WORDS, hf_folders

from fairseq_qn.recipe import Recipe

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.S | re.M)
ELSEWHERE = ("bash run_scripts/setup.sh", "bash run_scripts/quickstart.sh", "bash run_scripts/test.sh")
TINY = "--arch qn_roberta --encoder-layers 2 --encoder-embed-dim 64 --encoder-ffn-embed-dim 128 \
    --encoder-attention-heads 4 --max-positions 20 --cpu"
CUT = {
    "--test test.tsv -o": "--test test.tsv --epochs 1 -o",
    "--arch qn_roberta_base": TINY,
    "--lr 2e-5": "--lr 1e-3 --warmup-updates 2",
}


@pytest.fixture(scope="module", name="folder")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bert/ and the sets, of three classes."""
    folder = tmp_path_factory.mktemp("readme")
    made = hf_folders()
    made.write_bert(folder / "bert", made.wordpiece_lines(), hidden_size=64, intermediate_size=128)
    draw = random.Random(1)
    for name in ("train", "valid", "test"):
        rows = [(draw.choice("abc"), " ".join(draw.choices(WORDS, k=6))) for _ in range(40)]
        (folder / f"{name}.tsv").write_text("".join(f"{label}\t{text}\n" for label, text in rows))
    (folder / "lines.txt").write_text("the code\nwhere to go\n")
    return folder


def test_there_are_blocks_of_each_kind() -> None:
    kinds = [kind for kind, _ in BLOCKS]
    assert {*kinds} == {"bash", "python", "yaml", "text"}
    assert kinds.count("bash") >= 5
    assert kinds.count("python") >= 3


def test_what_is_cut_down_is_there() -> None:
    text = "".join(text for _, text in BLOCKS)
    assert not [words for words in CUT if words not in text]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "text"),
    [(kind, text) for kind, text in BLOCKS if kind != "text" and not any(run in text for run in ELSEWHERE)],
    ids=lambda value: value.split("\n")[0][:40],
)
def test_block(kind: str, text: str, folder: Path) -> None:
    if kind == "yaml":
        whole = text.startswith("version")
        (folder / "written.yaml").write_text(text if whole else f"version: 1\n{text}")
        found = Recipe.load(folder / "written.yaml")
        assert len(found.stages) == 3 if whole else found.share and found.prune
        return
    for words, fewer in CUT.items():
        text = text.replace(words, fewer)
    root, here = str(README.parent), os.path.dirname(sys.executable)
    path = os.pathsep.join([here, os.environ["PATH"]])
    env = os.environ | {"PATH": path, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    command = ["bash", "-euo", "pipefail", "-c", text] if kind == "bash" else [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
