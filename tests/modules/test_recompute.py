"""A pass that activation checkpointing computes again in backward draws the noise that it drew, whichever
pass it is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from small import clock_of, loss, noisy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import fairseq_qn
from fairseq_qn.errors import ViewError

FC = {
    "version": 1,
    "noise": {"kind": "proxy", "p": 0.5},
    "rules": [{"layers": ".*", "scheme": "product", "block_size": 2}],
}


class Stack(nn.Module):
    """Two blocks; how the first and second are computed is said from outside."""

    def __init__(self, call: Callable[..., Tensor]) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.norm, self.a, self.b, self.head = (
            nn.LayerNorm(8),
            nn.Linear(8, 16),
            nn.Linear(16, 8),
            nn.Linear(8, 8),
        )
        self.body = nn.Sequential(self.a, nn.GELU(), self.b)
        self.call = call

    def closure(self, x: Tensor) -> Tensor:
        return x + self.b(F.gelu(self.a(self.norm(x))))

    def bare(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.a.weight), self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self, self.call(self, x)))


WAYS: dict[str, Callable[[Stack], Callable[[Tensor], Tensor]]] = {
    "module": lambda m: m.body,
    "closure": lambda m: m.closure,
    "bare": lambda m: m.bare,
}
ORDERS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "sum": lambda a, b: (a + b).backward(),
    "product": lambda a, b: (a * b).backward(),
    "first first": lambda a, b: (a.backward(), b.backward()),
    "last first": lambda a, b: (b.backward(), a.backward()),
    "twice": lambda a, b: (a.backward(retain_graph=True), b.backward(), a.backward()),
}


def stack_gradients(
    call: Callable[..., Tensor], order: str, passes: int = 2, forward: bool = False
) -> list[Tensor]:
    model = Stack(call).train()
    fairseq_qn.apply(model, FC)
    x = torch.linspace(-1, 1, 24).reshape(3, 8).requires_grad_()  # the same for both
    for _ in range(2):  # in the second round passes of the first are over
        losses = [(model.forward if forward else model)(x).pow(2).sum() for _ in range(passes)]
        ORDERS[order](*losses)
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_two_passes_before_backward_are_computed_again_as_they_were(
    reentrant: bool, way: str, order: str
) -> None:
    plain = stack_gradients(lambda m, x: WAYS[way](m)(x), order)
    again = stack_gradients(lambda m, x: checkpoint(WAYS[way](m), x, use_reentrant=reentrant), order)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


def test_in_segments_and_in_one_another() -> None:
    def segments(m: Stack, x: Tensor) -> Tensor:
        return checkpoint_sequential(m.body, 2, x, use_reentrant=True)

    def nested(reentrant: bool) -> Callable[[Stack, Tensor], Tensor]:
        inner = lambda m, x: checkpoint(m.closure, x, use_reentrant=reentrant)  # noqa: E731
        return lambda m, x: checkpoint(lambda y: inner(m, inner(m, y)), x, use_reentrant=reentrant)

    plain = stack_gradients(lambda m, x: m.body(x), "sum")
    for a, b in zip(plain, stack_gradients(segments, "sum"), strict=True):
        torch.testing.assert_close(a, b)
    plain = stack_gradients(lambda m, x: m.closure(m.closure(x)), "sum")
    for reentrant in (True, False):
        for a, b in zip(plain, stack_gradients(nested(reentrant), "sum"), strict=True):
            torch.testing.assert_close(a, b)


def test_pinned_passes_are_remembered_too() -> None:
    gradients = []
    for recompute in (None, True, False):
        model, losses = noisy(recompute=recompute), []
        for micro in range(2):
            fairseq_qn.set_update(model, 3, micro)
            losses.append(loss(model))
        sum(losses).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(other, plain)


def test_a_pass_that_cannot_be_told_raises() -> None:
    """The loss depends on nothing that a call gave out, but on what a hook took from within."""
    model, kept = Stack(lambda m, x: checkpoint(m.body, x, use_reentrant=False)).train(), []
    fairseq_qn.apply(model, FC)
    model.head.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    x = torch.ones(3, 8, requires_grad=True)
    model(x), model(x)
    with pytest.raises(
        ViewError, match="^a weight is computed again in backward, and of which pass cannot be told"
    ):
        kept[0].sum().backward()
    fairseq_qn.set_update(model, 0)
    model(x)
    kept[-1].sum().backward()


def test_nothing_grows_with_the_passes() -> None:
    model = Stack(lambda m, x: checkpoint(m.body, x, use_reentrant=True)).train()
    fairseq_qn.apply(model, FC)
    x = torch.ones(3, 8, requires_grad=True)
    for _ in range(30):
        model(x).sum().backward()
    gc.collect()
    assert (
        not clock_of(model)._tasks and len(clock_of(model)._called) < 12 and clock_of(model).values is None
    )
