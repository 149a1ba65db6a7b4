"""Tiny data for real fairseq runs, made here from a fixed seed: text, a sentencepiece model, binarised
sets.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece
import torch

pytest.importorskip("fairseq")

from fairseq import options
from fairseq_cli import preprocess
from fairseq_run import CLASSES, MLM, Run, recipe, sentences, train, write_recipe

import fairseq_qn  # noqa: F401
from fairseq_qn.cli import main


@dataclass(frozen=True)
class Data:
    """Folders for --data, and the sentencepiece model that made them."""

    root: Path
    pieces: Path
    lm: Path
    classes: Path
    values: Path
    pairs: Path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """fairseq and Hydra are old, and warn of it hundreds of times a run."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for kind in ("UserWarning", "FutureWarning", "DeprecationWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Text of 80 words: a language-model set, two classes (is the first word an early one?), values, and a
    toy translation.
    """
    root = tmp_path_factory.mktemp("data")
    text = {"train": sentences(240, 1), "valid": sentences(24, 2)}
    pieces = root / "pieces.model"
    _learn_pieces([line for lines in text.values() for line in lines], pieces)
    model = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    specials = {"<unk>", "<s>", "</s>"}
    symbols = [model.id_to_piece(i) for i in range(len(model)) if model.id_to_piece(i) not in specials]
    (root / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in symbols))
    for split, lines in text.items():
        encoded = [" ".join(model.encode(line, out_type=str)) for line in lines]
        backwards = [
            " ".join(model.encode(" ".join(reversed(line.split())), out_type=str)) for line in lines
        ]
        labels = ["early" if line.split()[0] < "lo" else "late" for line in lines]
        for ending, content in (("src", encoded), ("tgt", backwards), ("label", labels)):
            (root / f"{split}.{ending}").write_text("".join(f"{line}\n" for line in content))
    dictionary = ["--srcdict", str(root / "dict.txt")]
    _binarise(root, "src", root / "lm", *dictionary)
    for folder in ("classes", "values"):
        _binarise(root, "src", root / folder / "input0", *dictionary)
    _binarise(root, "label", root / "classes" / "label")
    _binarise(
        root, "", root / "pairs", "-s", "src", "-t", "tgt", "--joined-dictionary", *dictionary, pair=True
    )
    (root / "values" / "label").mkdir()
    for split, lines in text.items():  # to regress: pieces of a sentence, in tens
        values = [f"{len(model.encode(line)) / 10}\n" for line in lines]
        (root / "values" / "label" / f"{split}.label").write_text("".join(values))
    return Data(root, pieces, root / "lm", root / "classes", root / "values", root / "pairs")


def _learn_pieces(lines: list[str], target: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=60, model_type="bpe", minloglevel=2
    )
    target.write_bytes(model.getvalue())


def _binarise(root: Path, ending: str, target: Path, *more: str, pair: bool = False) -> None:
    suffix = "" if pair else f".{ending}"
    words = [
        "--trainpref",
        f"{root}/train{suffix}",
        "--validpref",
        f"{root}/valid{suffix}",
        "--destdir",
        str(target),
    ]
    words += ["--workers", "1", *([] if pair else ["--only-source"]), *more]
    before = list(logging.getLogger("fairseq_cli.preprocess").handlers)
    preprocess.main(options.get_preprocessing_parser().parse_args(words))
    logging.getLogger("fairseq_cli.preprocess").handlers = before


@pytest.fixture(scope="session")
def masked(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A masked LM, frozen in three stages."""
    folder = tmp_path_factory.mktemp("masked")
    options = {
        "--quant-recipe": write_recipe(folder / "r.yaml", recipe()),
        "--quant-stage-updates": "10,12,14",
    }
    return train(folder, data.lm, MLM, options, {"--max-update": 20, "--lr": 1e-2})


@pytest.fixture(scope="session")
def classifier(data: Data, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A classifier of two classes, frozen in three stages, its head included."""
    folder = tmp_path_factory.mktemp("classifier")
    content = recipe()
    layers = r"classification_heads\..*\.(dense|out_proj)"
    content["rules"].append(
        {"layers": layers, "scheme": "product", "n_centroids": 16, "block_size": 4, "stage": "attn"}
    )
    options = {
        "--quant-recipe": write_recipe(folder / "r.yaml", content),
        "--quant-stage-updates": "20,24,28",
    }
    return train(folder, data.classes, CLASSES, options, {"--max-update": 40, "--lr": 5e-3})


@pytest.fixture(scope="session")
def small(data: Data, classifier: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The classifier's small file, with its sentencepiece model."""
    path = tmp_path_factory.mktemp("small") / "classifier.qn.safetensors"
    words = ["--bpe", "sentencepiece", "--bpe-files", str(data.pieces), "--keep-head"]
    assert main(["compress", str(classifier.folder / "checkpoint_last.pt"), "-o", str(path), *words]) == 0
    return path
