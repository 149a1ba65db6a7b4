"""A transformer's Linears on integers, and fp32 between them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from integers import RULE, IntegersAlone, loaded
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fairseq_qn
from fairseq_qn.errors import UnsupportedError
from fairseq_qn.modules.integer_layer import IntegerLinear, levels_of


class Layer(nn.Module):
    """A transformer's, whose projections are called; a head that is not quantised."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.qkv, self.proj = nn.Embedding(20, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.fc1, self.fc2, self.norm = nn.Linear(16, 32), nn.Linear(32, 16, bias=False), nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(-1, (2, 24)).transpose(-2, -3).chunk(3, -1)
        x = self.norm(x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)))
        return self.head(self.norm(x + self.fc2(F.gelu(self.fc1(x)))))


LAYERS = ("qkv", "proj", "fc1", "fc2")
IDS = torch.arange(60).view(3, 20) * 7 % 20


def trained(**rule: Any) -> nn.Module:
    model = Layer()
    rules = [{**RULE, "layers": "|".join(LAYERS), **rule}]
    fairseq_qn.apply(model, {"version": 1, "rules": rules}, seed=0)
    model.train()(IDS)
    return model.eval()


class Products(TorchDispatchMode):
    """dtypes of the matrix products, by the shape of the right one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.dtype, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.append((result.dtype, tuple(args[-1].shape)))
        return result


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_products_are_of_integers(granularity: str, tmp_path: Path) -> None:
    model = trained(granularity=granularity)
    found = loaded(model, tmp_path / "m", Layer(1))
    packed = fairseq_qn.load(tmp_path / "m", "packed", Layer(1))
    with Products() as products, torch.no_grad():
        answers, expected = found(IDS), packed(IDS)
    shapes = [tuple(getattr(found, name).levels.t().shape) for name in LAYERS]
    integers = [shape for dtype, shape in products.seen if dtype == torch.int32]
    reals = [shape for dtype, shape in products.seen if dtype != torch.int32]
    assert integers == shapes and reals == [(16, 5), *shapes, (16, 5)], "the head, and the packed model's"
    # a step of an input, here and there, and no more
    assert (answers - expected).abs().max() < 0.01 * expected.abs().max()
    assert torch.equal(pickle.loads(pickle.dumps(found))(IDS), answers)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_one_layer_is_right_to_its_step(granularity: str, tmp_path: Path) -> None:
    """Rounding of the bias, and requantisation to one scale: a step at most."""
    model = trained(granularity=granularity)
    found = loaded(model, tmp_path / "m", Layer(1))
    layer, plain = found.fc1, model.fc1
    assert isinstance(layer, IntegerLinear) and (layer.in_features, layer.out_features) == (16, 32)
    x = torch.randn(2, 7, 16)
    assert (layer(x) - plain(x)).abs().max() <= 1.01 * layer.step + 1e-6
    q = levels_of(x, layer.scale, layer.zero).view(-1, 16)
    with IntegersAlone():
        whole = layer.integers(q)
    assert whole.dtype == torch.int32 and layer(x).dtype == torch.float32 and layer(x).shape == (2, 7, 32)
    assert torch.equal(layer(x.transpose(0, 1)), layer(x).transpose(0, 1)), "as of fairseq's attention"
    assert layer(x[:0]).shape == (0, 7, 32) and layer(x * torch.nan).isfinite().all()


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ({"symmetric": False}, "qkv: expected symmetric integers over a tensor or channels"),
        ({"activations": 8}, "qkv: expected a static range of 8 bits"),
        ({"layers": "embed"}, "none of the model's Linears is quantised"),
    ],
)
def test_what_has_no_integers_is_refused_by_name(rule: dict[str, Any], found: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"^mode integer: {found}"):
        loaded(trained(**rule), tmp_path / "m", Layer(1))
