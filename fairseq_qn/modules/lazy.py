"""A weight that is not there until somebody needs it dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

aten = torch.ops.aten


class Source(Protocol):
    """What can stand for a weight."""

    def decoded(self) -> Tensor:
        """The weight, dense."""

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """F.linear(x, weight, bias) without the dense weight."""


class LazyWeight(Tensor):
    """Stands for a weight [out_features, in_features], or its transpose, of the shape, dtype and device of the dense one.

    F.linear(x, w, b), x @ w.t() and addmm(b, x, w.t()) are products by the source, beneath autograd; every other operation
    gets the dense weight. It has no storage: what reads memory without torch (numpy) has to ask for `decoded()` of the layer.
    """

    @staticmethod
    def __new__(cls, source: Source, shape: Sequence[int], like: Tensor, transposed: bool = False) -> LazyWeight:
        shape = shape[::-1] if transposed else shape
        return Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(self, source: Source, shape: Sequence[int], like: Tensor, transposed: bool = False) -> None:
        self.source, self.weight_shape, self.like, self.transposed = source, shape, like, transposed

    def dense(self) -> Tensor:
        """What it stands for."""
        weight = self.source.decoded()
        return weight.t() if self.transposed else weight

    def flipped(self) -> LazyWeight:
        """The transpose."""
        return LazyWeight(self.source, self.weight_shape, self.like, not self.transposed)

    def numpy(self, *, force: bool = False) -> Any:
        """As of the dense weight."""
        return self.dense().numpy(force=force)

    def tolist(self) -> list[Any]:
        """As of the dense weight."""
        return self.dense().tolist()

    def __repr__(self, **kwargs: Any) -> str:
        return repr(self.dense())

    # torch's Python functions, such as multi_head_attention_forward, run as they are; their products arrive below
    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = _SPECIAL[func](*args) if func in _SPECIAL and not kwargs else None
        if found is not None:
            return found
        dense = lambda value: value.dense() if isinstance(value, LazyWeight) else value  # noqa: E731
        return func(*tree_map(dense, list(args)), **tree_map(dense, dict(kwargs or {})))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None, transposed: bool = False) -> Tensor | None:
    """The product by the weight's source, or None where it is another kind of product."""
    if type(x) is LazyWeight or type(bias) is LazyWeight or type(weight) is not LazyWeight:
        return None
    if weight.transposed is not transposed or x.dtype != weight.dtype or x.device != weight.device or x.dim() == 0:
        return None
    if bias is not None and (bias.shape != weight.weight_shape[:1] or bias.dtype != x.dtype):
        return None
    if x.shape[-1] != weight.weight_shape[1] or x.numel() == 0:
        return None
    return weight.source.product(x, bias)


_SPECIAL: dict[Any, Callable] = {
    aten.linear.default: lambda x, weight, bias=None: _product(x, weight, bias),
    aten.matmul.default: lambda x, weight: _product(x, weight, None, True),
    aten.mm.default: lambda x, weight: _product(x, weight, None, True),
    aten.addmm.default: lambda bias, x, weight: _product(x, weight, bias, True),
    aten.t.default: lambda weight: weight.flipped(),
    aten.detach.default: lambda weight: weight,
}
