"""qn_image_classification and qn_efficientnet by stock fairseq-train: noise, stages, resume, the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fairseq_run import LOOP, Run, differing, train, write_recipe

import fairseq_qn
from fairseq_qn import hub
from fairseq_qn.cli import main
from fairseq_qn.errors import DataError, MismatchError
from fairseq_qn.tasks.image_data import read_images, read_names

NAMES = ("low", "high", "even")
IMAGES = {
    "--task": "qn_image_classification", "--arch": "qn_efficientnet", "--width": 0.25, "--depth": 0.3,
    "--num-classes": 3, "--image-size": 12, "--image-channels": 1, "--criterion": "quantization_aware",
    "--wrapped-criterion": "label_smoothed_cross_entropy", "--report-accuracy": None, **LOOP,
    "--lr": 6e-3, "--clip-norm": 10,
    "--total-num-update": 80, "--norm-momentum": 0.3, "--stochastic-depth": 0.1,
}  # fmt: skip
RULES = [
    {"layers": ".*project", "scheme": "product", "block_size": 4, "n_centroids": 256, "stage": "pw"},
    {"layers": ".*depthwise", "where": {"kernel_size": [3, 3]}, "scheme": "product", "block_size": 9,
     "n_centroids": 64, "stage": "dw"},
    {"layers": ".*(excite|squeeze|expand)|head", "scheme": "integer", "bits": 8, "stage": "dw"},
    {"layers": "classifier", "scheme": "product", "block_size": 4, "n_centroids": 256, "stage": "out"},
]  # fmt: skip
RECIPE = {"version": 1, "noise": {"kind": "proxy", "p": 0.05}, "rules": RULES, "stages": ["pw", "dw", "out"]}


def write_set(path: Path, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images that are bright at the top, at the bottom, or nowhere."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, n)
    images = generator.integers(0, 60, (n, 10, 8), dtype=np.uint8)
    images[labels == 0, :4] += 120
    images[labels == 1, 6:] += 120
    np.savez(path, images=images, labels=labels)
    return images, labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("images")
    write_set(made / "train.npz", 96, 1)
    write_set(made / "valid.npz", 24, 2)
    (made / "labels.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return made


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list[Any]]:
    out = tmp_path_factory.mktemp("run")
    recipe = write_recipe(out / "r.yaml", RECIPE)
    words = [str(folder), IMAGES, {"--quant-recipe": recipe, "--quant-stage-updates": "36,40,44"}]
    words.append({"--max-update": 72})
    return train(out / "run", words, {"--save-interval-updates": 38, "--keep-interval-updates": -1}), words


def test_it_learns_through_its_stages(trained: tuple[Run, list[Any]], folder: Path, tmp_path: Path) -> None:
    """What the file answers is what training ended with."""
    run, _ = trained
    figures = run.logged("valid")
    assert figures[-1]["valid_accuracy"] > 70 and figures[-1]["valid_qn_frozen_share"] > 0.9
    path = tmp_path / "m.qn.safetensors"
    assert main(["compress", str(run.folder / "checkpoint_last.pt"), "-o", str(path)]) == 0
    images, labels = write_set(tmp_path / "test.npz", 60, 3)
    for mode in ("dense", "packed"):
        found = hub.load_interface(path, mode)
        right = [answer[0][0] == NAMES[label] for answer, label in zip(found.classify(images), labels)]
        assert sum(right) > 45
    with torch.no_grad():
        expected = run.model(hub.prepared(torch.from_numpy(images), 12))
    torch.testing.assert_close(found.logits(torch.from_numpy(images)), expected, rtol=0, atol=0.05)
    fairseq_qn.load(path, "packed")
    assert main(["verify", str(path)]) == 0


def test_a_resumed_run_ends_the_same_to_the_bit(trained: tuple[Run, list[Any]], tmp_path: Path) -> None:
    run, words = trained
    resumed = train(tmp_path / "again", words, {"--restore-file": run.path(38)})
    assert differing(run.state()["model"], resumed.state()["model"]) == []


def test_batch_norms_folded_and_an_accuracy_of_integers(folder: Path, tmp_path: Path) -> None:
    rules = [{"layers": ".*", "scheme": "integer", "bits": 8, "symmetric": True, "granularity": "tensor",
              "fold_batch_norm": True}]  # fmt: skip
    recipe = write_recipe(
        tmp_path / "r.yaml", {"version": 1, "noise": {"kind": "proxy", "p": 1}, "rules": rules}
    )
    run = train(tmp_path / "run", str(folder), IMAGES, {"--quant-recipe": recipe, "--max-update": 4})
    assert repr(run.model).count("folded") == sum(
        isinstance(m, torch.nn.BatchNorm2d) for m in run.model.modules()
    )


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"labels": None}, "expected an .npz with arrays images and labels"),
        ({"images": np.zeros((4, 2, 2))}, r"images: expected uint8 .*, found float64 \[4, 2, 2, 1\]"),
        (
            {"images": np.zeros((4, 2, 2, 3), np.uint8)},
            "expected 1 channels, found 3; give --image-channels 3",
        ),
        ({"images": np.array([{}] * 4)}, "expected an .npz with arrays images and labels"),
        ({"labels": np.zeros(3, np.int64)}, "a whole number for each of 4 images"),
        ({"labels": np.zeros(4)}, "a whole number for each of 4 images, found float64"),
        ({"labels": np.array([0, 1, 2, 3])}, "labels: expected 0 to 2, found 0 to 3"),
        ({"labels": np.array([0, 1, 2, -1])}, "labels: expected 0 to 2, found -1 to 2"),
    ],
)
def test_a_set_that_is_none(change: dict[str, Any], found: str, tmp_path: Path) -> None:
    given = {"images": np.zeros((4, 2, 2), np.uint8), "labels": np.zeros(4, np.int64), **change}
    np.savez(tmp_path / "train.npz", **{key: value for key, value in given.items() if value is not None})
    with pytest.raises(DataError, match=found):
        read_images(tmp_path / "train.npz", 1, 3)
    for content in (b"", b"PK\x03\x04 no archive", b"\x80\x04N."):
        (tmp_path / "train.npz").write_bytes(content)
        with pytest.raises(DataError, match="train.npz: expected an .npz with arrays images and labels"):
            read_images(tmp_path / "train.npz", 1, 3)


def test_names_of_classes(folder: Path, tmp_path: Path) -> None:
    for text in ("a\na\n", "a\n\nb\n", "<s>\n"):
        (tmp_path / "labels.txt").write_text(text)
        with pytest.raises(DataError, match="labels.txt: expected a name of its own in each line"):
            read_names(tmp_path)
    with pytest.raises(MismatchError, match="has 3 labels"):
        train(tmp_path / "run", str(folder), {**IMAGES, "--num-classes": 4}, {"--max-update": 1})
