"""A small model that reads its weights in every way that a network does, and recipes for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import fairseq_qn
from fairseq_qn.modules.clock import Clock
from fairseq_qn.modules.view import views_of

D, WORDS, PAD = 8, 20, 1


class Attention(nn.Module):
    """Projections that are never called: `.weight` is read, as fairseq's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        biases = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        return F.multi_head_attention_forward(
            x, x, x, D, 2, None, biases, None, None, False, 0.0, self.out_proj.weight, self.out_proj.bias,
            use_separate_proj_weight=True, q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )[0]  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.fc1, self.fc2, self.norm = (
            Attention(),
            nn.Linear(D, 16),
            nn.Linear(16, D),
            nn.LayerNorm(D),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return self.norm(x + self.fc2(F.gelu(self.fc1(x))))


class Net(nn.Module):
    """ids [length, batch] -> scores [length, batch, WORDS]. The head reads the embedding's Parameter through
    its own name.
    """

    def __init__(self, seed: int = 0, recompute: bool | None = None) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.embed = nn.Embedding(WORDS, D, padding_idx=PAD)
        with torch.no_grad():
            self.embed.weight.mul_(D**-0.5)  # as fairseq, so that scores are of the order of 1
        self.conv = nn.Conv2d(1, 12, 3, padding=1)
        self.mix = nn.Conv2d(12, 1, 1)
        self.block = Block()
        self.head = nn.Linear(D, WORDS)
        self.head.weight = self.embed.weight
        self.recompute = recompute  # None, or the use_reentrant of torch's checkpointing

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.mix(F.relu(self.conv(x.unsqueeze(1)))).squeeze(1)
        x = (
            self.block(x)
            if self.recompute is None
            else checkpoint(self.block, x, use_reentrant=self.recompute)
        )
        return F.linear(x, self.head.weight, self.head.bias)


LAYERS = {
    "embed": 4, "conv": 9, "mix": 2, "block.attn.q_proj": 4, "block.attn.k_proj": 4, "block.attn.v_proj": 4,
    "block.attn.out_proj": 2, "block.fc1": 8, "block.fc2": 8,
}  # fmt: skip
STAGES = {"embed": "emb", "conv": "conv", "mix": "conv"}
IDS = torch.tensor([[2, 5, 7], [19, 3, PAD], [4, PAD, PAD], [0, 6, 11]])


def recipe(
    *names: str, kind: str = "none", p: Any = 0.0, refresh: Any = "epoch", k: int = 5, **rule: Any
) -> dict[str, Any]:
    """A rule for each of the named layers, or all, in stages ffn, emb and conv, product unless `rule` says
    otherwise.
    """
    product = rule.get("scheme", "product") == "product"
    rules = [
        {
            "layers": name.replace(".", r"\."), "scheme": "product", "stage": STAGES.get(name, "ffn"),
            **({"block_size": LAYERS[name], "n_centroids": k} if product else {}), **rule,
        }
        for name in names or LAYERS
    ]  # fmt: skip
    return {"version": 1, "noise": {"kind": kind, "p": p, "refresh": refresh}, "rules": rules}


def loss(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """A scalar that every weight moves."""
    scores = model(ids)
    return F.cross_entropy(scores.flatten(0, 1), ids.flip(0).flatten()) + scores.pow(2).mean()


NOISES = {
    "proxy": {"kind": "proxy"},
    "exact": {"kind": "exact"},
    "int4": {"kind": "proxy", "scheme": "integer", "bits": 4},
}


def noisy(*names: str, p: float = 0.5, noise: str = "proxy", seed: int = 0, **net: Any) -> Net:
    """A model in training with noise on the named layers, or all."""
    model = Net(**net)
    fairseq_qn.apply(model, recipe(*names, p=p, **NOISES[noise]), seed=seed)
    fairseq_qn.refresh(model)
    return model.train()


MODES = ["dense", "packed"]  # of load
SCHEMES = {
    "k2": {"k": 2}, "k3": {"k": 3}, "k5": {"k": 5}, "k16": {"k": 16}, "k200": {"k": 200, "block_size": 1},
    "k257": {"k": 257, "block_size": 1}, "clipped": {"k": 65_536}, "int8 codebook": {"codebook_bits": 8},
    **{f"int{bits}": {"scheme": "integer", "bits": bits} for bits in range(2, 9)},
    "tensor": {"scheme": "integer", "bits": 4, "granularity": "tensor"},
    "group": {"scheme": "integer", "bits": 4, "granularity": "group", "group_size": 3},
}  # fmt: skip


def clock_of(model: nn.Module) -> Clock:
    """The one clock of a model's views."""
    (clock,) = {view.clock for view in views_of(model)}
    return clock


@torch.no_grad()
def train_the_pad_row(model: nn.Module, factor: float = 1.0) -> None:
    """As a softmax that is tied to the table would."""
    model.embed.weight[PAD] = factor * torch.linspace(-1, 1, D)


def frozen(change: Callable[[nn.Module], None] | None = None, **rule: Any) -> Net:
    model = Net(seed=1)
    if change:
        change(model)
    data = recipe(**rule)
    for entry in data["rules"]:
        if entry["layers"] == "mix" and entry.get("granularity") == "group":
            entry["group_size"] = 4
        elif entry.get("granularity") == "group":
            entry["group_size"] = 3 if entry["layers"] == "conv" else 4
    fairseq_qn.apply(model, data)
    fairseq_qn.freeze(model)
    return model.eval()


@torch.no_grad()
def answers(model: nn.Module) -> Tensor:
    return model(IDS)


def assert_answers(found: Tensor, expected: Tensor, mode: str) -> None:
    """Dense models answer exactly; packed ones sum in another order: to 1e-5 of the largest answer."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert (found - expected).abs().max() <= (1e-5 * expected.abs().max() if mode == "packed" else 0)
