"""The stand-in for a packed layer's weight: products without the dense weight, and the dense weight for all
else.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fairseq_qn.kernels import native
from fairseq_qn.modules.lazy import LazyWeight
from fairseq_qn.modules.packed import pack
from fairseq_qn.schemes.blocks import StoredProduct

pytestmark = pytest.mark.skipif(
    native.library() is None, reason="the kernel was not compiled at installation"
)
OUT, IN, PAD = 24, 16, 3


def table(pad: int | None = None, bias: bool = True) -> tuple[nn.Linear, Tensor]:
    """A packed Linear and its dense weight."""
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT, bias=bias)
    codes = torch.randint(0, 50, (OUT, 4), dtype=torch.uint8)
    weight = StoredProduct((OUT, IN), codes, torch.randn(50, 4), pad)
    dense = weight.dense()
    pack(layer, weight)
    return layer, dense


def attention(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    square, b = weight[:IN], bias[:IN]
    return F.multi_head_attention_forward(
        x, x, x, IN, 2, None, torch.cat([b, b, b]), None, None, False, 0.0, square, b,
        use_separate_proj_weight=True,
        q_proj_weight=square, k_proj_weight=square, v_proj_weight=square, need_weights=False,
    )[0]  # fmt: skip


PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "linear, no bias": lambda x, w, b: F.linear(x, w),
    "x @ w.t()": lambda x, w, b: x @ w.t(),
    "matmul, flat": lambda x, w, b: torch.matmul(x.flatten(0, -2), w.t()),
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, -2), w.t()),
    "mm": lambda x, w, b: x.flatten(0, -2).mm(w.t()),
    "a vector": lambda x, w, b: F.linear(x[0, 0], w, b),
}
OTHERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "addmm, scaled": lambda x, w, b: torch.addmm(b, x.flatten(0, -2), w.t(), alpha=2.0, beta=0.5),
    "a bias of one number": lambda x, w, b: torch.addmm(b[:1], x.flatten(0, -2), w.t()),
    "the weight on the left": lambda x, w, b: w @ x[0].t(),
    "not transposed": lambda x, w, b: F.linear(x, w, b) @ w,
    "with itself": lambda x, w, b: w @ w.t(),
    "rows": lambda x, w, b: F.embedding(torch.tensor([1, PAD, 5]), w),
    "arithmetic": lambda x, w, b: (2 * w + 1).sum(0),
    "slices": lambda x, w, b: F.linear(x, w[4:9]),
    "views": lambda x, w, b: torch.cat([w.T, w.view(IN, OUT)], 1).permute(1, 0).contiguous(),
    "norm": lambda x, w, b: w.norm() + w.detach().abs().max(),
    "a new one": lambda x, w, b: torch.zeros_like(w) + w.clone() + w.new_ones(1),
    "in double": lambda x, w, b: F.linear(x.double(), w.double(), b.double()),
    "nothing": lambda x, w, b: F.linear(x[:0], w, b),
    "einsum": lambda x, w, b: torch.einsum("tbi,oi->tbo", x, w),
    "attention": attention,
}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("pad", [None, PAD])
@pytest.mark.parametrize("name", [*PRODUCTS, *OTHERS])
def test_whatever_is_done_with_it_gives_what_the_dense_weight_gives(
    name: str, pad: int | None, mode: Callable[[], torch.inference_mode]
) -> None:
    layer, dense = table(pad)
    x, function = torch.randn(5, 3, IN), {**PRODUCTS, **OTHERS}[name]
    with mode():
        assert type(layer.weight) is LazyWeight
        found, expected = function(x, layer.weight, layer.bias), function(x, dense, layer.bias)
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_never_see_the_dense_weight(
    name: str, mode: Callable[[], torch.inference_mode], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, _ = table()
    monkeypatch.delattr("fairseq_qn.quant.product.decode")
    with mode():
        PRODUCTS[name](torch.randn(5, 3, IN), layer.weight, layer.bias)


def test_the_shape_is_known_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, dense = table()
    monkeypatch.delattr("fairseq_qn.quant.product.decode")
    weight = layer.weight
    assert (
        weight.shape == dense.shape
        and weight.t().shape == dense.t().shape
        and weight.numel() == dense.numel()
    )
    assert (
        weight.dtype == dense.dtype
        and weight.device == dense.device
        and not weight.requires_grad
        and weight.dim() == 2
    )
    assert weight.size(0) == len(weight) == OUT and weight.is_floating_point() and not weight.is_cuda


def test_an_answer_does_not_wait_for_torchs_distributed_tensors() -> None:
    """The first dispatch to a tensor subclass imports them, 0.6 s; so products are caught before unless
    gradients flow.
    """
    code = """
        import sys, torch
        from test_lazy import OTHERS, PRODUCTS, table
        layer, dense = table()
        with torch.no_grad():
            for function in (*PRODUCTS.values(), OTHERS["arithmetic"], OTHERS["slices"]):
                function(torch.randn(5, 3, 16), layer.weight, layer.bias)
            layer(torch.randn(2, 16))
        print("torch.distributed.tensor" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "False", done.stderr


def test_gradients_of_what_comes_before_and_of_the_bias() -> None:
    layer, dense = table(PAD)
    x = torch.randn(5, 3, IN, requires_grad=True)
    twin, bias = x.detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    layer(x).square().sum().backward()
    F.linear(twin, dense, bias).square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)


def test_values_for_those_who_leave_torch() -> None:
    layer, dense = table()
    assert (layer.weight.numpy() == dense.numpy()).all() and layer.weight.tolist() == dense.tolist()
    assert repr(layer.weight) == repr(dense) and layer.weight[2, 1].item() == dense[2, 1].item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer, dense = table(PAD)
    x = torch.randn(5, IN)
    with torch.no_grad():
        expected = F.linear(x, dense, layer.bias)
        found = layer.to(dtype)(x.to(dtype))
    assert found.dtype == layer.weight.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=3e-2, atol=3e-2)


def test_a_mistaken_shape_or_dtype_is_torchs_own_error() -> None:
    layer, dense = table()
    for x in (torch.randn(5, IN + 4), torch.randn(5, IN, dtype=torch.float64)):
        with pytest.raises(RuntimeError) as expected:
            F.linear(x, dense, layer.bias)
        with pytest.raises(RuntimeError) as found:
            layer(x)
        assert str(found.value) == str(expected.value)


def test_a_trace_holds_the_dense_weight() -> None:
    layer, dense = table()
    traced = torch.jit.trace(layer, torch.randn(2, IN))
    x = torch.randn(7, IN)
    torch.testing.assert_close(traced(x), F.linear(x, dense, layer.bias))
