"""Tiny models and labelled sentences, made from a fixed seed."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from types import ModuleType

import pytest

WORDS = "the of a in and was to he is by they said where not code report march rose door go".split()
KINDS = ("classes", "pairs", "numbers")
RECIPE = {
    "version": 1,
    "noise": {"kind": "exact", "p": 0.1},
    "rules": [
        {"layers": r".*\.fc[12]", "scheme": "product", "block_size": 8, "n_centroids": 16, "stage": "ffn"},
        {"layers": ".*embed_tokens", "scheme": "integer", "bits": 8, "stage": "emb"},
    ],
    "stages": ["ffn", "emb"],
}


def hf_folders() -> ModuleType:
    """tests/interop/hf_folders.py, which pytest puts on no path of these tests."""
    path = Path(__file__).parents[1] / "interop" / "hf_folders.py"
    spec = importlib.util.spec_from_file_location("hf_folders_of_commands", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_model(folder: Path) -> Path:
    """A BERT folder of 2 layers and 32 dimensions that takes 20 tokens."""
    made = hf_folders()
    made.write_bert(folder, made.wordpiece_lines(), hidden_size=32, intermediate_size=64)
    return folder


def row(draw: random.Random, kind: str) -> str:
    """A line: `early` or `late` by the first word; a pair with any label; half the number of words."""
    first, second = ([draw.choice(WORDS) for _ in range(draw.randint(3, 8))] for _ in range(2))
    label = {
        "classes": "early" if first[0] < "m" else "rather late",
        "pairs": draw.choice(["no", "yes", "maybe"]),
        "numbers": str(len(first) / 2),
    }[kind]
    return "\t".join([label, " ".join(first), *([" ".join(second)] if kind == "pairs" else [])])


def write_sets(folder: Path, kind: str) -> list[str]:
    """train.tsv of 60 rows and valid.tsv of 20; words of a command that name them."""
    draw = random.Random(1)
    for name, n in (("train", 60), ("valid", 20)):
        (folder / f"{name}.tsv").write_text("".join(f"{row(draw, kind)}\n" for _ in range(n)))
    return ["--train", str(folder / "train.tsv"), "--valid", str(folder / "valid.tsv")]


def write_recipe(folder: Path) -> Path:
    """A recipe of two stages."""
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    return folder / "recipe.yaml"


# fairseq and Hydra are old, and warn of it hundreds of times a run
QUIET = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("User", "Future", "Deprecation")]


@pytest.fixture(scope="session", name="tiny")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the files that import it: a conftest.py here would take the place of the one above."""
    return write_model(tmp_path_factory.mktemp("tiny"))
