"""A weight that is not there until somebody needs it dense."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
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

    F.linear(x, w, b), x @ w.t() and addmm(b, x, w.t()) are products by the source; every other operation gets the dense
    weight. It has no storage: what reads memory without torch has to ask for `decoded()` of the layer.

    Where gradients flow, products are caught beneath autograd (__torch_dispatch__), else above it (__torch_function__): the
    first of the former makes torch import its distributed tensors, which takes longer than many an answer.
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

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        named = getattr(func, "__name__", "")
        if named in _OF_THE_SHAPE or (func in _ABOVE and _differentiable(args)):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        found = _ABOVE[func](*args, **kwargs) if func in _ABOVE else None
        return _with_dense(func, args, kwargs) if found is None else found

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = _BENEATH[func](*args) if func in _BENEATH and not kwargs else None
        return _with_dense(func, args, kwargs or {}) if found is None else found


def _with_dense(func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    args, kwargs = tree_map(lambda v: v.dense() if isinstance(v, LazyWeight) else v, (list(args), dict(kwargs)))
    return func(*args, **kwargs)


def _differentiable(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)


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


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return _product(input, weight, bias)


def _matmul(input: Tensor, other: Tensor) -> Tensor | None:
    return _product(input, other, None, True)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor, **scales: float) -> Tensor | None:
    return None if scales else _product(x, weight, bias, True)


def _t(weight: LazyWeight) -> LazyWeight:
    return weight.flipped()


_ABOVE: dict[Any, Callable] = {F.linear: _linear, torch.addmm: _addmm, torch.t: _t, Tensor.t: _t} | dict.fromkeys(
    (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), _matmul
)
_BENEATH: dict[Any, Callable] = {
    aten.linear.default: _linear, aten.matmul.default: _matmul, aten.mm.default: _matmul, aten.addmm.default: _addmm,
    aten.t.default: _t, aten.detach.default: lambda weight: weight,
}  # fmt: skip
_OF_THE_SHAPE = {"__get__", "size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "__len__",
                 "is_complex", "get_device", "requires_grad_"}  # fmt: skip
