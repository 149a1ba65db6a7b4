"""A model with a stack of layers, and recipes that share, prune and quantise it."""

from __future__ import annotations

from typing import Any

import torch
from small import IDS, PAD, WORDS, Block, D
from torch import Tensor, nn
from torch.nn import functional as F

PER_LAYER = {".*fc[12]": 8, ".*attn.*_proj": 4}
INTEGERS = {"scheme": "integer", "bits": 4}


class Stacked(nn.Module):
    """ids [length, batch] -> scores [length, batch, WORDS]."""

    def __init__(self, depth: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(WORDS, D, padding_idx=PAD)
        self.layers = nn.ModuleList(Block() for _ in range(depth))
        self.num_layers = depth

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return F.linear(x, self.embed.weight)


def recipe(p: float = 0.0, scheme: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """Product codes, or a scheme, for all in the layers, with noise at `p`."""
    rules = [
        {"layers": name, **(scheme or {"scheme": "product", "block_size": d, "n_centroids": 4})}
        for name, d in PER_LAYER.items()
    ]
    return {"version": 1, "noise": {"kind": "proxy", "p": p}, "rules": rules, **more}


def share(chunk: int) -> list[dict[str, Any]]:
    return [{"layers": "layers", "chunk": chunk}]


def keep(which: str | list[int]) -> list[dict[str, Any]]:
    return [{"layers": "layers", "keep": which}]


@torch.no_grad()
def through(model: Stacked, numbers: list[int]) -> Tensor:
    """What the model answers by some of its layers alone."""
    x = model.embed(IDS)
    for number in numbers:
        x = model.layers[number](x)
    return F.linear(x, model.embed.weight)
