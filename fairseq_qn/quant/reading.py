"""A value that stands in for a weight, and its derivative: the straight-through estimator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def read(weight: Tensor, value: Function, gradient: Function | None) -> Tensor:
    """value(weight); the gradient is gradient(that of the value), or that itself (None): the
    straight-through estimator.

    >>> weight = torch.tensor([0.25, 0.75], requires_grad=True)
    >>> seen = read(weight, torch.round, None)
    >>> (3 * seen).sum().backward()
    >>> seen.tolist(), weight.grad.tolist()
    ([0.0, 1.0], [3.0, 3.0])
    """
    if torch._C._are_functorch_transforms_active():
        seen: Tensor = FunctionalRead.apply(weight, value, gradient)
        return seen
    seen = Read.apply(weight, value, gradient)
    # Where no gradient flows, flagged as the Parameter would be: matmul folds batches by it, so the last bit
    # depends on it.
    return seen if torch.is_grad_enabled() else seen.requires_grad_(weight.requires_grad)


def read_by(weight: Tensor, learned: Tensor, value: Function, gradients: Callable[..., Any]) -> Tensor:
    """value(weight), which depends on `learned` too: (gradient of the weight, of `learned`) are
    gradients(that of the value, weight).

    >>> weight, scale = (torch.tensor(x, requires_grad=True) for x in ([0.2, 1.7], [2.0]))
    >>> gradients = lambda grad, w: (grad, (grad * w.round()).sum())
    >>> seen = read_by(weight, scale, lambda w: w.round() * 2, gradients)
    >>> seen.sum().backward()
    >>> seen.tolist(), weight.grad.tolist(), scale.grad.tolist()
    ([0.0, 4.0], [1.0, 1.0], [2.0])
    """
    seen: Tensor = ReadBy.apply(weight, learned, value, gradients)
    return seen if torch.is_grad_enabled() else seen.requires_grad_(weight.requires_grad)


class ReadBy(torch.autograd.Function):
    """Of a weight and what is learned beside it; torch.func's transforms take it too."""

    @staticmethod
    def forward(weight: Tensor, learned: Tensor, value: Function, gradients: Any) -> Tensor:
        return value(weight).data

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, ctx.like, _, ctx.gradients = inputs
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dense = grad.to_dense() if grad.is_sparse else grad
        of_weight, of_learned = ctx.gradients(dense, *ctx.saved_tensors)
        if grad.is_sparse:
            of_weight = of_weight.to_sparse(grad.sparse_dim())
        return of_weight, of_learned.reshape(ctx.like.shape).to(ctx.like.dtype), None, None


class Read(torch.autograd.Function):
    """`gradient` is its own transpose: it serves forward derivatives too."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: Function, gradient: Function | None) -> Tensor:
        ctx.gradient = gradient
        return value(weight).data  # no view of anything: an Embedding with max_norm clips it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.gradient is None:
            return grad, None, None
        if grad.is_sparse:  # of an Embedding(sparse=True); its optimizer wants no other
            return ctx.gradient(grad.to_dense()).to_sparse(grad.sparse_dim()), None, None
        return ctx.gradient(grad), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return tangent.clone() if ctx.gradient is None else ctx.gradient(tangent)


class FunctionalRead(torch.autograd.Function):
    """Read for torch.func's transforms, which ask for another form of it, that takes longer to call."""

    @staticmethod
    def forward(weight: Tensor, value: Function, gradient: Function | None) -> Tensor:
        return value(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.gradient = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if ctx.gradient is None:
            return grad, None, None
        return FunctionalRead.apply(grad, ctx.gradient, ctx.gradient), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return (
            tangent.clone()
            if ctx.gradient is None
            else FunctionalRead.apply(tangent, ctx.gradient, ctx.gradient)
        )

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], weight: Tensor, value: Function, gradient: Function | None
    ) -> tuple[Tensor, int]:
        return torch.stack(
            [FunctionalRead.apply(part, value, gradient) for part in weight.unbind(in_dims[0])]
        ), 0
