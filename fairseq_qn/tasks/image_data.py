"""Labelled images, as fairseq batches them: a folder with train.npz, valid.npz, ... and, if classes have
names, labels.txt, one a line.

A set is numpy's own archive of two arrays: `images`, uint8 [n, height, width] or [n, height, width,
channels], and `labels`, whole numbers [n] from 0. It is read without pickle, so that nothing in it runs, and
takes no library of image formats.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary, FairseqDataset
from torch import Tensor

from fairseq_qn.errors import DataError
from fairseq_qn.models.images import prepared


class ImageDataset(FairseqDataset):
    """images uint8 [n, height, width, channels], labels int64 [n]; in batches of fp32 of one size."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, size: int, seed: int | None = None) -> None:
        """seed: of the order; None leaves them as they are."""
        self.images, self.labels, self.image_size = torch.from_numpy(images), torch.from_numpy(labels), size
        n = len(labels)
        self.order = np.arange(n) if seed is None else np.random.default_rng(seed).permutation(n)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor]:
        return index, self.images[index], self.labels[index]

    def collater(self, samples: Sequence[tuple[int, Tensor, Tensor]]) -> dict[str, Any]:
        """A batch as fairseq's criterions read it."""
        if not samples:
            return {}
        ids, images, labels = zip(*samples, strict=True)
        return {
            "id": torch.tensor(ids), "net_input": {"images": prepared(torch.stack(images), self.image_size)},
            "target": torch.stack(labels), "ntokens": len(ids), "nsentences": len(ids),
        }  # fmt: skip

    def num_tokens(self, index: int) -> int:
        """An image counts as one."""
        return 1

    def size(self, index: int) -> int:
        """Likewise."""
        return 1

    def ordered_indices(self) -> np.ndarray:
        """As they are dealt into batches, once, so that a resumed run has the same; fairseq puts the batches
        of each epoch into an order of their own.
        """
        return self.order


def read_images(path: Path, channels: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """(images [n, height, width, channels], labels int64 [n]) of a set. Raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as found:
            images, labels = found["images"], found["labels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        why = " ".join(str(error).split())[:100]
        raise DataError(f"{path}: expected an .npz with arrays images and labels, found {why}") from None
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        raise DataError(
            f"{path}: images: expected uint8 [n, height, width, channels], found {images.dtype} "
            f"{list(images.shape)}"
        )
    if images.shape[-1] != channels:
        found = images.shape[-1]
        raise DataError(
            f"{path}: images: expected {channels} channels, found {found}; give --image-channels {found}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: labels: expected a whole number for each of {len(images)} images, found "
            f"{labels.dtype} {list(labels.shape)}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise DataError(
            f"{path}: labels: expected 0 to {classes - 1}, found {labels.min()} to {labels.max()}; give "
            "--num-classes"
        )
    return images, labels.astype(np.int64)


def read_names(folder: Path) -> Dictionary | None:
    """The names of the classes, if the folder has any. Raises DataError for names that are no names."""
    path = folder / "labels.txt"
    if not path.is_file():
        return None
    try:
        names = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected UTF-8, a name in each line") from None
    names = [name.strip() for name in names[: -1 if names[-1] == "" else None]]
    dictionary = Dictionary()
    if len({*names}) < len(names) or not all(names) or {*names} & {*dictionary.symbols}:
        raise DataError(f"{path}: expected a name of its own in each line, none of {dictionary.symbols}")
    for name in names:
        dictionary.add_symbol(name)
    return dictionary
