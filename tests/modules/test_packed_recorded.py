"""Compressed modules under what records or transforms a computation: it has to hold the weight, not a
kernel's pointer.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_packed_modes import SCHEMES, both, wide
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

RECORDERS: dict[str, Callable[[nn.Module, Tensor], Callable]] = {
    "trace": torch.jit.trace,
    "export": lambda module, x: torch.export.export(module, (x,)).module(),
    "make_fx": lambda module, x: make_fx(module)(x),
    "compile": lambda module, x: torch.compile(module, backend="aot_eager", fullgraph=True),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["linear", "padded", "conv", "tied"])
@pytest.mark.parametrize("recorder", RECORDERS)
def test_what_is_recorded_holds_the_weight(recorder: str, name: str, scheme: str) -> None:
    """For other inputs than it was recorded with, and not memory that nobody wrote."""
    packed, dense, x = both(name, scheme)
    recorded = RECORDERS[recorder](packed, x)
    for _ in range(2):
        torch.full((1 << 16,), float("nan"))
        twin = torch.randn_like(x) if x.is_floating_point() else (x + 1) % 10
        torch.testing.assert_close(recorded(twin), dense(twin), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_at_a_real_width() -> None:
    layer, dense = wide(3072, 768, "integer")
    traced, x = torch.jit.trace(layer, torch.randn(2, 768)), torch.randn(5, 768)
    torch.testing.assert_close(traced(x), F.linear(x, dense, layer.bias))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("early", [False, True])
def test_transforms_of_functions(scheme: str, early: bool) -> None:
    """torch.func and forward-mode gradients, whether the weight was read before or inside."""
    layer, dense = wide(80, 64, scheme)
    x, v, kept = torch.randn(7, 64), torch.randn(7, 64), layer.weight

    def packed(x: Tensor) -> Tensor:
        return F.linear(x, kept if early else layer.weight, layer.bias.detach()).tanh()

    def expected(x: Tensor) -> Tensor:
        return F.linear(x, dense, layer.bias.detach()).tanh()

    def dual(function: Callable[[Tensor], Tensor]) -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, v))).tangent

    for transform in (
        lambda f: torch.func.vmap(f)(x), lambda f: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f: torch.func.jvp(f, (x,), (v,))[1], lambda f: torch.func.jacrev(f)(x[0]), dual,
    ):  # fmt: skip
        torch.testing.assert_close(transform(packed), transform(expected), rtol=1e-5, atol=1e-5)
