"""Images as a network reads them, and the interface that answers to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_qn.errors import UnsupportedError
from fairseq_qn.models.describe import label_names
from fairseq_qn.models.interfaces import Ranked, ranked


def prepared(images: Tensor, size: int) -> Tensor:
    """uint8 [n, height, width] or [n, height, width, channels] -> fp32 [n, channels, size, size] of -1 to 1.

    >>> prepared(torch.tensor([[[0, 255], [255, 0]]], dtype=torch.uint8), 2).tolist()
    [[[[-1.0, 1.0], [1.0, -1.0]]]]
    """
    x = images.unsqueeze(-1) if images.dim() == 3 else images
    x = x.permute(0, 3, 1, 2).float() / 127.5 - 1
    if x.shape[-2:] == (size, size):
        return x.contiguous()
    return F.interpolate(x, (size, size), mode="bilinear", align_corners=False, antialias=True)


class QNImageHub(nn.Module):
    """An image classifier with the names of its classes."""

    bpe = None  # no text

    def __init__(self, model: nn.Module, task: Any) -> None:
        super().__init__()
        self.model, self.task = model, task

    @classmethod
    def of(cls, model: nn.Module, task: Any, text: Mapping[str, Any]) -> QNImageHub:
        """The interface of a model."""
        return cls(model, task)

    @property
    def labels(self) -> list[str]:
        """Names of the classes, in the order of their logits; numbers without names."""
        named = self.task.label_dictionary
        names = [] if named is None else label_names(named)
        count = self.task.cfg.num_classes
        return names if len(names) == count else [str(i) for i in range(count)]

    def encode(self, *sentences: str) -> Tensor:
        """Raises UnsupportedError: what commands ask of every classifier is to read sentences."""
        raise UnsupportedError(
            "expected a model of sentences, found one of images; in Python: "
            "fairseq_qn.hub.load_interface(FILE).classify(images)"
        )

    def classify(self, images: Any, batch: int = 64) -> Ranked | list[Ranked]:
        """[(label, probability)] of one image, the likeliest first; of several, a list of these.

        images: uint8, [height, width, channels], or [n, height, width, channels] of several, an array or a
        tensor; images of one channel may lack the last. They go through the model `batch` at a time.
        Raises UnsupportedError.
        """
        x, channels = _tensor(images), self.task.cfg.image_channels
        if channels == 1 and (x.dim() == 2 or (x.dim() == 3 and x.shape[-1] != 1)):
            x = x.unsqueeze(-1)
        many = x.dim() == 4
        x = x if many else x.unsqueeze(0)
        if x.dtype != torch.uint8 or x.dim() != 4 or x.shape[-1] != channels or 0 in x.shape[1:]:
            raise UnsupportedError(
                f"classify: expected uint8 [height, width, {channels}], or [n, height, width, {channels}], "
                f"found {x.dtype} {list(_tensor(images).shape)}"
            )
        answers = ranked(self.logits(x, batch).softmax(-1), self.labels)
        return answers if many else answers[0]

    @torch.inference_mode()
    def logits(self, images: Tensor, batch: int = 64) -> Tensor:
        """uint8 [n, height, width, channels] -> fp32 [n, classes]."""
        size, like = self.task.cfg.image_size, next(iter(self.model.parameters()), torch.zeros(()))
        parts = (prepared(part.to(like.device), size).to(like.dtype) for part in images.split(batch))
        found = [self.model(part).float().cpu() for part in parts]
        return torch.cat(found) if found else torch.zeros(0, self.task.cfg.num_classes)


def _tensor(images: Any) -> Tensor:
    return images if isinstance(images, Tensor) else torch.from_numpy(np.ascontiguousarray(images))
