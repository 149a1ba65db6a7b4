"""A weight that is not there until somebody needs it dense."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from fairseq_qn.errors import UnsupportedError
from fairseq_qn.kernels import native
from fairseq_qn.schemes.base import Stored

aten = torch.ops.aten
_PLAIN = (Tensor, nn.Parameter)
_WRITES = re.compile(
    r"[a-z].*_|__(set|setitem|i(add|sub|mul|matmul|truediv|floordiv|mod|pow|and|or|xor|lshift|rshift))__"
)


class LazyWeight(Tensor):
    """Stands for a weight [out_features, in_features], or its transpose, of the shape, dtype and device of
    the dense one.

    F.linear(x, w, b), x @ w.t() and addmm(b, x, w.t()) are computed by what is stored, with gradients of x
    and b; every other operation gets the dense weight, but none may write to it. It has no memory of its
    own: what reads memory without torch has to ask for `decoded()` of the layer.

    Products are caught above autograd (__torch_function__): the first call that reaches __torch_dispatch__
    makes torch import its distributed tensors, which takes longer than many an answer. What gets there gets
    the dense weight.
    """

    @staticmethod
    def __new__(cls, stored: Stored, transposed: bool = False) -> LazyWeight:
        shape = stored.shape[::-1] if transposed else stored.shape
        return Tensor._make_wrapper_subclass(cls, shape, dtype=stored.like.dtype, device=stored.like.device)

    def __init__(self, stored: Stored, transposed: bool = False) -> None:
        self.stored, self.transposed = stored, transposed

    def dense(self) -> Tensor:
        """What it stands for."""
        weight = self.stored.dense()
        return weight.t() if self.transposed else weight

    def flipped(self) -> LazyWeight:
        """The transpose."""
        return LazyWeight(self.stored, not self.transposed)

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
        cls,
        func: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MATMULS:
            found = _by_stored(func, args, kwargs)
            return _with_dense(func, args, kwargs) if found is None else found
        if func in _TRANSPOSES:
            return (args[0] if args else kwargs["input"]).flipped()
        named = getattr(func, "__name__", "")
        if _WRITES.fullmatch(named) and type(args[0] if args else kwargs.get("tensor")) is LazyWeight:
            raise UnsupportedError(
                f'{named}: a packed weight is read-only; load the file with mode="dense" to change or train '
                "its weights"
            )
        if named in _OF_THE_SHAPE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        return _with_dense(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Callable,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return args[0] if func is aten.detach.default else _with_dense(func, args, kwargs or {})


class _Linear(torch.autograd.Function):
    """The product by what is stored, decoded once more for the gradient of x instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, stored: Stored) -> Tensor:
        ctx.stored = stored
        y = _linear(x, bias, stored)
        return aten._unsafe_view(y, y.shape)  # no view of what is not kept: attention scales it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, bias = ctx.needs_input_grad[:2]
        return (
            grad @ ctx.stored.dense().to(grad.dtype) if x else None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if bias else None,
            None,
        )


def _linear(x: Tensor, bias: Tensor | None, stored: Stored) -> Tensor:
    y = stored.linear(x, bias)
    return F.linear(x, stored.dense().to(x.dtype), bias) if y is None else y


def _by_stored(func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The product by what is stored, or None where it is another kind of product."""
    roles, transposed = _MATMULS[func]
    given = dict(zip(roles, args)) | kwargs
    if len(given) != len(args) + len(kwargs) or not given.keys() <= roles.keys():
        return None
    operands = {roles[name]: value for name, value in given.items()}
    x, weight, bias = (operands.get(role) for role in ("x", "weight", "bias"))
    if type(x) not in _PLAIN or type(weight) is not LazyWeight or not (bias is None or type(bias) in _PLAIN):
        return None
    like = weight.stored.like
    dtype = like.dtype
    if _autocast_on("cpu"):
        x, bias, dtype = _autocast(x), _autocast(bias), _autocast(like).dtype
    rank_2, (out_features, in_features) = "mat2" in roles, weight.stored.shape
    if (
        weight.transposed is not transposed or x.dim() == 0 or (rank_2 and x.dim() != 2)
        or x.shape[-1] != in_features or x.dtype != dtype or x.device != like.device
        or x.layout != torch.strided or x.numel() == 0 or native.watched()
    ):  # fmt: skip
        return None
    if bias is not None and (
        bias.shape != (out_features,) or bias.dtype != dtype or bias.device != x.device
    ):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, bias, weight.stored)
    return _linear(x, bias, weight.stored)


def _autocast(tensor: Tensor | None) -> Tensor | None:
    """What autocast makes of an operand of a product; LazyWeights are on the CPU."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(_autocast_dtype("cpu"))


if hasattr(torch, "get_autocast_dtype"):
    _autocast_on, _autocast_dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
else:  # torch below 2.4

    def _autocast_on(device: str) -> bool:
        return torch.is_autocast_cpu_enabled()

    def _autocast_dtype(device: str) -> torch.dtype:
        return torch.get_autocast_cpu_dtype()


def _with_dense(func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    args, kwargs = tree_map(
        lambda v: v.dense() if isinstance(v, LazyWeight) else v, (list(args), dict(kwargs))
    )
    return func(*args, **kwargs)


_MATMUL = ({"input": "x", "other": "weight"}, True)
_MM = ({"input": "x", "mat2": "weight"}, True)
_ADDMM = ({"input": "bias", "mat1": "x", "mat2": "weight"}, True)
# names of the arguments -> what they are; whether the weight is transposed
_MATMULS: dict[Any, tuple[dict[str, str], bool]] = {
    F.linear: ({"input": "x", "weight": "weight", "bias": "bias"}, False),
    torch.matmul: _MATMUL, Tensor.matmul: _MATMUL, Tensor.__matmul__: _MATMUL, torch.mm: _MM, Tensor.mm: _MM,
    torch.addmm: _ADDMM, Tensor.addmm: _ADDMM,
}  # fmt: skip
_TRANSPOSES = {torch.t, Tensor.t, Tensor.T.__get__}
_OF_THE_SHAPE = frozenset(
    "__get__ size dim ndimension numel nelement element_size is_floating_point __len__ is_complex get_device"
    .split()
)  # fmt: skip
