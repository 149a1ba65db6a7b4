"""Compressed modules where torch does more than compute: gradients, autocast, recording and transforms, at
real widths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_packed import MODULES, inputs, integers_of, packed_and_dense
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_qn.errors import UnsupportedError
from fairseq_qn.modules.lazy import LazyWeight
from fairseq_qn.modules.packed import pack, tie
from fairseq_qn.schemes.base import Stored
from fairseq_qn.schemes.blocks import StoredProduct

SCHEMES = ["product", "integer"]
PAD = 3


class Tied(nn.Module):
    """An embedding whose weight a head reads, as fairseq's LM head does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 12, padding_idx=PAD), nn.Linear(12, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.embed(ids).tanh(), self.head.weight) + self.head.bias


def both(name: str, scheme: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """(packed, dense, input) of a kind of module, `tied` among them."""
    if name != "tied":
        packed, dense = packed_and_dense(name, scheme)
        return packed, dense, inputs(dense)
    packed, dense = Tied(), Tied()
    packed.embed, dense.embed = packed_and_dense("padded", scheme)
    dense.load_state_dict({"head.bias": packed.head.bias, "head.weight": dense.embed.weight}, strict=False)
    dense.head.weight = dense.embed.weight
    tie(packed.head, "weight", packed.embed)
    return packed, dense, inputs(dense.embed)


def wide(rows: int, columns: int, scheme: str, pad: int | None = None) -> tuple[nn.Linear, Tensor]:
    """A packed Linear of this size, and its dense weight."""
    generator = torch.Generator().manual_seed(0)
    weight: Stored
    if scheme == "integer":
        table = torch.randn(rows, columns, generator=generator) / columns**0.5
        weight = integers_of(table, 8, "channel")
    else:
        codes = torch.randint(0, 256, (rows, columns // 8), dtype=torch.uint8, generator=generator)
        row = None if pad is None else torch.randn(columns, generator=generator)
        codebook = torch.randn(256, 8, generator=generator) / columns**0.5
        weight = StoredProduct((rows, columns), codes, codebook, pad, row)
    layer = nn.Linear(columns, rows)
    pack(layer, weight)
    return layer, weight.dense()


def gradients(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """The value of a function of tensors, and the gradients of a scalar of it that every element moves."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    y = function(*leaves)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float32).to(
        y.dtype
    )
    found = torch.autograd.grad((y * weights).sum(), leaves)
    return [y.detach(), *found]


def assert_all_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


# -- gradients


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", [*MODULES, "tied"])
def test_gradients_are_those_of_the_dense_module(name: str, scheme: str) -> None:
    packed, dense, x = both(name, scheme)
    names = [name for name, _ in packed.named_parameters()]
    assert names or isinstance(packed, nn.Embedding)

    def run(module: nn.Module) -> Callable[..., Tensor]:
        def function(*tensors: Tensor) -> Tensor:
            values, rest = dict(zip(names, tensors)), tensors[len(names) :]
            return torch.func.functional_call(module, values, rest or (x,)) ** 2

        return function

    given = [packed.get_parameter(name) for name in names] + ([x] if x.is_floating_point() else [])
    if given:
        assert_all_close(gradients(run(packed), *given), gradients(run(dense), *given))
    else:
        assert not packed(x).requires_grad


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("rows", "columns"), [(3072, 768), (768, 3072)])
@pytest.mark.parametrize("n", [1, 200, 256, 257])
def test_gradients_at_the_widths_of_a_roberta_base(n: int, rows: int, columns: int, scheme: str) -> None:
    """More than 2^20 weights, which integers are decoded of some at a time, up to and above 256 rows of
    input.
    """
    layer, dense = wide(rows, columns, scheme, pad=PAD)
    x = torch.randn(n, columns)
    found = gradients(lambda x, bias: F.linear(x, layer.weight, bias), x, layer.bias)
    assert_all_close(found, gradients(lambda x, bias: F.linear(x, dense, bias), x, layer.bias))
    # as in a model that is not told no_grad: the input needs no gradient, the bias does
    bias_alone = layer(x)
    assert bias_alone.requires_grad and torch.equal(bias_alone.detach(), found[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_vocabulary_of_50265(scheme: str) -> None:
    layer, dense = wide(50265, 768, scheme, pad=PAD)
    x = torch.randn(2, 4, 768).transpose(0, 1)
    found = gradients(lambda x, bias: F.linear(x, layer.weight, bias), x, layer.bias)
    assert_all_close(found, gradients(lambda x, bias: F.linear(x, dense, bias), x, layer.bias))


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear(weight=)": lambda x, w, b: F.linear(x, weight=w),
    "linear(input=, weight=)": lambda x, w, b: F.linear(input=x, weight=w),
    "linear(bias=, weight=, input=)": lambda x, w, b: F.linear(bias=b, weight=w, input=x),
    "linear(x, w, bias=)": lambda x, w, b: F.linear(x, w, bias=b),
    "matmul(input=, other=)": lambda x, w, b: torch.matmul(input=x, other=w.t()),
    "x.matmul(other=)": lambda x, w, b: x.matmul(other=w.t()),
    "x @ w.t()": lambda x, w, b: x @ w.t(),
    "x @ w.T": lambda x, w, b: x @ w.T,
    "x @ w.mT": lambda x, w, b: x @ w.mT,
    "x @ transpose": lambda x, w, b: x @ w.transpose(0, 1),
    "t(input=)": lambda x, w, b: x @ torch.t(input=w),
    "mm(mat2=)": lambda x, w, b: torch.mm(x, mat2=w.t()),
    "x.mm(mat2=)": lambda x, w, b: x.mm(mat2=w.t()),
    "addmm(input=, mat1=, mat2=)": lambda x, w, b: torch.addmm(input=b, mat1=x, mat2=w.t()),
    "b.addmm(x, mat2=)": lambda x, w, b: b.addmm(x, mat2=w.t()),
    "addmm(beta=, alpha=)": lambda x, w, b: torch.addmm(b, x, w.t(), beta=2, alpha=3),
    "addmm of a matrix": lambda x, w, b: torch.addmm(b + x[:, :1], x, w.t()),
    "w @ x": lambda x, w, b: (w @ x.t()).t(),
    "bmm": lambda x, w, b: torch.bmm(x.unsqueeze(0), w.t().unsqueeze(0)),
    "data": lambda x, w, b: F.linear(x, w.data, b),
    "detached": lambda x, w, b: F.linear(x, w.detach(), b),
    "linear of a slice": lambda x, w, b: F.linear(x, w[:9], b[:9]),
    "twice": lambda x, w, b: F.linear(F.linear(x, w, b).tanh()[:, :64], w, b),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("form", FORMS)
def test_products_in_every_form(form: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same value and gradients, though other layers were computed between the product and its
    gradient.
    """
    monkeypatch.setattr("fairseq_qn.schemes.integer.CHUNK", 64 * 33)
    layer, dense = wide(80, 64, scheme)
    other, _ = wide(96, 64, scheme)
    x, function = torch.randn(7, 64), FORMS[form]

    def run(x: Tensor, bias: Tensor) -> Tensor:
        y = function(x, layer.weight, bias)
        other(torch.randn(3, 64))  # writes over the memory in which rows were decoded
        return y + 0 * bias.sum()

    found = gradients(run, x, layer.bias)
    assert_all_close(found, gradients(lambda x, b: function(x, dense, b) + 0 * b.sum(), x, layer.bias))
    with torch.no_grad():
        assert_all_close([function(x, layer.weight, layer.bias)], [function(x, dense, layer.bias)])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_out_and_second_derivatives(scheme: str) -> None:
    layer, dense = wide(80, 64, scheme)
    x, y = torch.randn(7, 64, dtype=torch.float32), torch.empty(7, 80)
    torch.matmul(x, layer.weight.t(), out=y)
    torch.testing.assert_close(y, x @ dense.t())

    def second(weight: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(F.linear(leaf, weight).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), leaf)[0]

    assert_all_close([second(layer.weight)], [second(dense)])


def test_a_mistaken_call_is_torchs_own_error() -> None:
    layer, dense = wide(80, 64, "integer")
    x = torch.randn(7, 64)
    for call in (
        lambda w: F.linear(x), lambda w: F.linear(x, w, None, None), lambda w: torch.mm(x[0], w.t()),
        lambda w: torch.matmul(x, other=w.t(), input=x), lambda w: F.linear(x, w, other=x),
        lambda w: F.linear(x, w, bias=torch.zeros(3)), lambda w: torch.addmm(layer.bias, x[0], w.t()),
    ):  # fmt: skip
        with pytest.raises((TypeError, RuntimeError)) as expected:
            call(dense)
        with pytest.raises(expected.type) as found:
            call(layer.weight)
        assert str(found.value) == str(expected.value)


# -- autocast


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", [*MODULES, "tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, scheme: str, dtype: torch.dtype) -> None:
    """The dtype and, within it, the values and gradients of the dense module."""
    packed, dense, x = both(name, scheme)
    x = x.requires_grad_() if x.is_floating_point() else x
    results = []
    for module in (packed, dense):
        with torch.autocast("cpu", dtype):
            y = module(x)
        wanted = [p for key, p in module.named_parameters() if key.endswith("bias")] + [
            x
        ] * x.is_floating_point()
        results.append([y, *(torch.autograd.grad(y.float().pow(2).sum(), wanted) if wanted else ())])
        with torch.autocast("cpu", dtype), torch.no_grad():
            results[-1].append(module(x))
        looked_up = torch.float32 if isinstance(dense, nn.Embedding) else dtype
        assert y.dtype == looked_up == results[-1][-1].dtype or name == "tied"
    assert_all_close(*results, tolerance=2e-2)
    assert packed(x).dtype == torch.float32  # and afterwards as before


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast_leaves_double_and_integers_to_torch(scheme: str) -> None:
    layer, dense = wide(80, 64, scheme)
    for x in (torch.randn(7, 64, dtype=torch.float64), torch.ones(7, 64, dtype=torch.int64)):
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(RuntimeError) as expected:
                F.linear(x, dense, layer.bias)
            with pytest.raises(RuntimeError) as found:
                layer(x)
        assert str(found.value) == str(expected.value)


# -- what is refused


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["embedding", "padded", "clipped"])
@pytest.mark.parametrize("ids", [[-1], [0, -10], [10], [2**40]])
def test_ids_out_of_range_are_torchs_own_error(ids: list[int], name: str, scheme: str) -> None:
    packed, dense = packed_and_dense(name, scheme)
    with pytest.raises(IndexError) as expected:
        dense(torch.tensor(ids))
    with pytest.raises(IndexError) as found:
        packed(torch.tensor(ids))
    assert str(found.value) == str(expected.value)
    with pytest.raises(RuntimeError):
        packed(torch.tensor([1.0]))


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "init": nn.init.normal_, "mul_": lambda w: w.mul_(2), "setitem": lambda w: w.__setitem__(0, 1.0),
    "requires_grad_": lambda w: w.requires_grad_(),
    "requires_grad": lambda w: setattr(w, "requires_grad", True),
    "data": lambda w: setattr(w, "data", torch.zeros(80, 64)), "iadd": lambda w: w.__iadd__(1),
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("write", WRITES)
def test_a_packed_weight_is_read_only(write: str, scheme: str) -> None:
    layer, _ = wide(80, 64, scheme)
    assert type(layer.weight) is LazyWeight
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedError, match=r'read-only; load the file with mode="dense"'),
    ):
        WRITES[write](layer.weight)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_mode_says_that_packed_weights_stay(scheme: str) -> None:
    layer, _ = wide(80, 64, scheme)
    model = nn.Sequential(layer, nn.Linear(80, 2))
    with pytest.warns(UserWarning, match="packed weights do not train, only what is dense beside them"):
        model.train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(3, 64)).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize("rows", [2, 300])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_a_product_gives_may_be_written_to(scheme: str, rows: int) -> None:
    """As fairseq's attention scales its queries."""
    layer, dense = wide(80, 64, scheme)
    x = torch.randn(rows, 3, 64)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        y = F.linear(x, weight, layer.bias)
        y *= 0.5
        return y

    found = gradients(lambda x: run(x, layer.weight), x)
    assert_all_close(found, gradients(lambda x: run(x, dense), x))
