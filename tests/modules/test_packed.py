"""Compressed modules: what they compute, hold and survive, against the dense modules that they stand for."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from strategies import hostile
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_qn.modules.packed import Packed, pack, tie
from fairseq_qn.quant import integer, product
from fairseq_qn.schemes.base import Stored
from fairseq_qn.schemes.blocks import StoredProduct
from fairseq_qn.schemes.integer import StoredIntegers


class Custom(nn.Linear):
    """A user's own layer."""


MODULES = {
    "linear": lambda: nn.Linear(12, 10),
    "embedding": lambda: nn.Embedding(10, 12),
    "padded": lambda: nn.Embedding(10, 12, padding_idx=3),
    "clipped": lambda: nn.Embedding(10, 12, max_norm=1.0),
    "conv": lambda: nn.Conv2d(4, 10, 3, stride=2, padding=1, padding_mode="reflect"),
    "conv1x1": lambda: nn.Conv2d(12, 10, 1),
    "grouped": lambda: nn.Conv2d(8, 10, 3, groups=2),
    "custom": lambda: Custom(12, 10),
}
PRODUCTS = ("linear", "custom")  # which sum in another order than a dense one


def integers_of(weight: Tensor, *how: Any) -> StoredIntegers:
    found = integer.quantize(weight, *how)
    return StoredIntegers(tuple(weight.shape), found.levels, found.scale, found.zero)


def weight_for(module: nn.Module, scheme: str, k: int = 7) -> Stored:
    weight = module.weight.detach()
    block_size = 3 if weight.dim() == 2 or weight.shape[-1] == 1 else 9
    if scheme == "integer":
        return integers_of(weight, 5, "group", 12)
    pad = getattr(module, "padding_idx", None)
    codes, clusters = product.learn(weight, block_size, k, padding_idx=pad)
    return StoredProduct(tuple(weight.shape), codes, clusters.codebook, pad)


def packed_and_dense(name: str, scheme: str, k: int = 7) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    packed = MODULES[name]()
    dense = copy.deepcopy(packed)
    weight = weight_for(packed, scheme, k)
    with torch.no_grad():
        dense.weight.copy_(weight.dense())
    pack(packed, weight)
    return packed, dense


def inputs(module: nn.Module) -> Tensor:
    if isinstance(module, nn.Embedding):
        return torch.tensor([[3, 0, 9], [3, 3, 1]])
    return (
        torch.randn(2, module.in_channels, 9, 9) if isinstance(module, nn.Conv2d) else torch.randn(2, 5, 12)
    )


@pytest.mark.parametrize("scheme", ["product", "integer"])
@pytest.mark.parametrize("name", MODULES)
def test_same_answers_as_the_dense_module(name: str, scheme: str) -> None:
    packed, dense = packed_and_dense(name, scheme)
    x = inputs(dense)
    assert torch.equal(packed.weight, dense.weight)
    torch.testing.assert_close(packed(x), dense(x), rtol=0, atol=0 if name not in PRODUCTS else 1e-6)
    assert "weight" not in dict(packed.named_parameters()) and not any(
        key.endswith("weight") for key in packed.state_dict()
    )
    base = type(dense)
    assert isinstance(packed, Packed) and isinstance(packed, base)
    assert type(packed).__name__ == ("Int" if scheme == "integer" else "PQ") + base.__name__
    if name == "padded" and scheme == "product":
        assert not packed(torch.tensor(3)).any() and not packed.weight[3].any()


@pytest.mark.parametrize("k", [2, 256, 257, 40_000])
def test_an_embedding_with_codes_of_every_width(k: int) -> None:
    table = hostile("normal", (7000, 6), 0)
    codes = torch.randint(0, k, (7000, 2), generator=torch.Generator().manual_seed(0)).to(
        product.codes_dtype(k)
    )
    weight = StoredProduct((7000, 6), codes, hostile("normal", (k, 3), 1), 5)
    packed = nn.Embedding(7000, 6, padding_idx=5, _weight=table)
    pack(packed, weight)
    for ids in (
        torch.tensor([[5, 6999], [0, 5]]),
        torch.tensor(5),
        torch.tensor([], dtype=torch.long),
        torch.tensor([4]).int(),
    ):
        assert torch.equal(packed(ids), F.embedding(ids, weight.dense()))


@pytest.mark.parametrize("scheme", ["product", "integer"])
@pytest.mark.parametrize("name", MODULES)
def test_copies_and_pickles(name: str, scheme: str) -> None:
    packed, _ = packed_and_dense(name, scheme)
    x = inputs(packed)
    for twin in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(twin(x), packed(x)) and isinstance(twin, type(packed))
        assert not {t.data_ptr() for t in twin.buffers()} & {t.data_ptr() for t in packed.buffers()}


@pytest.mark.parametrize("scheme", ["product", "integer"])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_conversions(name: str, scheme: str, dtype: torch.dtype) -> None:
    packed, dense = packed_and_dense(name, scheme)
    x = inputs(dense)
    expected = dense(x)
    packed.to(dtype)
    found = packed(x.to(dtype) if x.is_floating_point() else x)
    assert found.dtype == packed.weight.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("scheme", ["product", "integer"])
def test_a_tied_owner_reads_the_home_and_stays_tied_in_copies(scheme: str) -> None:
    table, _ = packed_and_dense("padded", scheme)
    model = nn.Module()
    model.embed, model.head = table, nn.Linear(12, 10)
    tie(model.head, "weight", model.embed)
    assert set(model.state_dict()) == {f"embed.{name}" for name in table.state_dict()} | {"head.bias"}
    x = torch.randn(2, 12)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.head(x), F.linear(x, twin.embed.weight, twin.head.bias))
        assert isinstance(twin.head, nn.Linear)
        next(twin.embed.buffers()).zero_()
        assert torch.equal(twin.head.weight, twin.embed.weight)


@pytest.mark.parametrize("scheme", ["product", "integer"])
def test_only_what_is_asked_for_is_decoded(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = packed_and_dense("embedding", scheme)

    def refuse(*_: Any) -> None:
        raise AssertionError("the whole table was decoded")

    monkeypatch.setattr(type(packed.qn_stored), "dense", refuse)
    packed(torch.tensor([1, 2]))
    with pytest.raises(AssertionError):
        packed.weight + 0


@pytest.mark.parametrize(("granularity", "group_size"), [("tensor", 0), ("channel", 0), ("group", 32)])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_integers_some_rows_at_a_time(
    kind: type[nn.Module], granularity: str, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    packed = kind(64, 70) if kind is nn.Linear else kind(70, 64)
    weight = integers_of(packed.weight, 4, granularity, group_size)
    dense, bias = weight.dense(), getattr(packed, "bias", None)
    pack(packed, weight)
    if kind is nn.Embedding:
        ids = torch.tensor([[0, 69, 3], [3, 3, 8]])
        assert torch.equal(packed(ids), F.embedding(ids, dense)) and packed(ids[:0]).shape == (0, 3, 64)
        return
    monkeypatch.setattr("fairseq_qn.schemes.integer.CHUNK", 64 * 9)
    for x in (torch.randn(2, 3, 64), torch.randn(64), torch.randn(300, 64), torch.randn(0, 64)):
        torch.testing.assert_close(packed(x), F.linear(x, dense, bias))
    assert torch.equal(packed.weight, dense)


def test_it_is_smaller_in_memory() -> None:
    layer = nn.Linear(768, 768, bias=False)
    pack(layer, weight_for(layer, "product", 256))
    held = sum(tensor.numel() * tensor.element_size() for tensor in layer.buffers())
    assert not list(layer.parameters()) and held == 768 * 256 + 256 * 3 * 4
