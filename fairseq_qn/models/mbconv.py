"""EfficientNet (Tan and Le 2019) in plain torch: inverted bottlenecks with squeeze-and-excitation, swish."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Stage(NamedTuple):
    """Blocks in a row, of which the first has the stride."""

    expansion: int
    kernel: int
    stride: int
    channels: int
    blocks: int


STEM, HEAD = 32, 1280
STAGES = (  # of B0, table 1
    Stage(1, 3, 1, 16, 1), Stage(6, 3, 2, 24, 2), Stage(6, 5, 2, 40, 2), Stage(6, 3, 2, 80, 3),
    Stage(6, 5, 1, 112, 3), Stage(6, 5, 2, 192, 4), Stage(6, 3, 1, 320, 1),
)  # fmt: skip


class EfficientNet(nn.Module):
    """fp32 images [batch, channels, height, width] of -1 to 1 -> logits [batch, classes].

    width, depth: factors of the channels and of the blocks of B0. dropout: before the classifier.
    stochastic_depth: probability of leaving out the last block in training; earlier ones less, linearly.
    momentum: of the batch norms' statistics, 0.01 as published, for runs of many updates.
    """

    def __init__(
        self, classes: int, channels: int = 3, width: float = 1.0, depth: float = 1.0, dropout: float = 0.2,
        stochastic_depth: float = 0.2, momentum: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__()
        size, last = rounded(STEM * width), rounded(HEAD * width)
        self.stem, self.stem_norm = _conv(channels, size, 3, 2), _norm(size)
        blocks: list[nn.Module] = []
        total = sum(ceil(stage.blocks * depth) for stage in STAGES)
        for stage in STAGES:
            for i in range(ceil(stage.blocks * depth)):
                out, stride = rounded(stage.channels * width), 1 if i else stage.stride
                left_out = stochastic_depth * len(blocks) / total
                blocks.append(Block(size, out, stage.expansion, stage.kernel, stride, left_out))
                size = out
        self.blocks = nn.Sequential(*blocks)
        self.head, self.head_norm = _conv(size, last, 1), _norm(last)
        self.dropout, self.classifier = nn.Dropout(dropout), nn.Linear(last, classes)
        nn.init.uniform_(self.classifier.weight, -(classes**-0.5), classes**-0.5)
        nn.init.zeros_(self.classifier.bias)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum

    def forward(self, images: Tensor) -> Tensor:
        """Images -> logits."""
        x = self.blocks(F.silu(self.stem_norm(self.stem(images))))
        x = F.silu(self.head_norm(self.head(x))).mean((2, 3))
        return self.classifier(self.dropout(x))


class Block(nn.Module):
    """An inverted bottleneck: expand, depthwise, squeeze and excite, project; a residual where it may be."""

    def __init__(
        self, size: int, out: int, expansion: int, kernel: int, stride: int, left_out: float
    ) -> None:
        super().__init__()
        wide, squeezed = size * expansion, max(1, size // 4)
        self.expand = _conv(size, wide, 1) if expansion > 1 else None
        self.expand_norm = _norm(wide) if expansion > 1 else None
        self.depthwise, self.depthwise_norm = _conv(wide, wide, kernel, stride, wide), _norm(wide)
        self.squeeze, self.excite = nn.Conv2d(wide, squeezed, 1), nn.Conv2d(squeezed, wide, 1)
        self.project, self.project_norm = _conv(wide, out, 1), _norm(out)
        self.residual, self.left_out = stride == 1 and size == out, left_out

    def forward(self, x: Tensor) -> Tensor:
        """[batch, size, h, w] -> [batch, out, h / stride, w / stride]."""
        y = x if self.expand is None else F.silu(self.expand_norm(self.expand(x)))
        y = F.silu(self.depthwise_norm(self.depthwise(y)))
        y = y * torch.sigmoid(self.excite(F.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = self.project_norm(self.project(y))
        if not self.residual:
            return y
        if self.training and self.left_out:  # of each image for itself (Huang et al. 2016)
            kept = torch.rand(len(y), 1, 1, 1, device=y.device) >= self.left_out
            y = y * kept / (1 - self.left_out)
        return x + y


def rounded(channels: float) -> int:
    """To a multiple of 8, never below 90% of what was asked.

    >>> [rounded(32 * width) for width in (0.25, 1.0, 1.1, 1.2)]
    [8, 32, 32, 40]
    """
    found = max(8, int(channels + 4) // 8 * 8)
    return found if found >= 0.9 * channels else found + 8


def _conv(size: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(size, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.normal_(conv.weight, std=(2 * groups / (out * kernel**2)) ** 0.5)  # as published: fan out
    return conv


def _norm(size: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(size, eps=1e-3)  # as published
