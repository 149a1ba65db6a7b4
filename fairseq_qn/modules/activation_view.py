"""What a layer computes with in place of its input while it trains; a loaded model has a scheme of
schemes/activation.py there.

    phase of the weight   in training                               in evaluation
    FLOAT, CODED          x + m * (phi(x) - x), m ~ Bernoulli(p)    x
    FROZEN                phi(x)                                    phi(x)

p is that of the weight's noise, each value drawn for itself. Before the update `start` training sees x.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fairseq_qn.artifact.header import short
from fairseq_qn.errors import MismatchError, UnsupportedError, ViewError
from fairseq_qn.modules.match import Match, Owner
from fairseq_qn.modules.view import FROZEN, WeightView
from fairseq_qn.quant.activations import rounded, span
from fairseq_qn.quant.noise import bernoulli, is_certain, seed_of
from fairseq_qn.recipe import is_conv1d
from fairseq_qn.schemes.activation import Activations, Dynamic, Static

RANGE, MOMENTUM = "activation_range", 0.99
UNSEEN, BITS_OF_INF = -1, 0x7F800000  # as int32, -1 is the bits of NaN
TODO = "train with it, call it in training mode, or take dynamic ranges"


class ActivationView:
    """What a layer that trains computes with in place of its input.

    A static range is a buffer of the layer, int64 [2]: the bits of (-low, high) in fp32, which no change of
    the model's dtype rounds, and of which a mean is a range again; UNSEEN before the first training forward.
    """

    def __init__(self, lines: Activations, view: WeightView, owner: Owner) -> None:
        self.lines, self.view, self.name, self.module = lines, view, owner.name, owner.module
        self.axes = 3 if isinstance(owner.module, nn.Conv2d) else 1
        if self.is_static:
            if hasattr(self.module, RANGE):
                todo = "a name that its activations need; rename it"
                raise UnsupportedError(f"{self.name}: the module already has {RANGE!r}, {todo}")
            with torch.inference_mode(False):  # a tensor that can be written to
                unseen = torch.full((2,), UNSEEN, device=view.weight.device)
            self.module.register_buffer(RANGE, unseen)

    @property
    def is_static(self) -> bool:
        """Whether it has a range of its own."""
        return self.lines.ranges == Static.name

    @property
    def stored(self) -> Tensor:
        """The buffer of a static range."""
        return self.module._buffers[RANGE]

    @property
    def label(self) -> str:
        """In a few letters."""
        return f"int{self.lines.bits} in"

    @property
    def is_unseen(self) -> bool:
        """Whether it has a range that nothing has gone through."""
        return self.is_static and bool((self.stored < 0).any())

    def entry(self) -> dict[str, Any]:
        """The manifest's record; a range of 0 where none was seen."""
        if not self.is_static:
            return Dynamic(self.lines.bits, self.axes).entry()
        low, high = (0.0, 0.0) if self.is_unseen else (end.item() for end in self._ends())
        return Static(self.lines.bits, low, high).entry()

    def check(self, found: Any) -> None:
        """Raise MismatchError for what no range of a checkpoint is."""
        whole = isinstance(found, Tensor) and found.dtype == torch.int64 and found.shape == (2,)
        if not whole or not bool(((found >= UNSEEN) & (found < BITS_OF_INF)).all()):
            shown = short(found.tolist() if isinstance(found, Tensor) and found.numel() < 9 else found)
            raise MismatchError(
                f"{self.name}: {RANGE}: expected the bits of two finite numbers, int64 [2], found {shown}; "
                "load another checkpoint"
            )

    def clear(self) -> None:
        """Take its buffer off again."""
        self.module._buffers.pop(RANGE, None)

    def __call__(self, x: Tensor) -> Tensor:
        """What the module computes with; in training, a static range moves first."""
        known = not self.is_static or (self.module.training and self._observe(x))
        p = self._probability()
        if p == 0 or not x.numel():
            return x
        if not known and self.is_unseen:
            raise ViewError(f"{self.name}: no input has been seen, and so no range; {TODO}")
        mask = None if is_certain(p) else self._mask(x, p)
        ends = self._ends() if self.is_static else span(x, self.axes)
        return rounded(x, *ends, self.lines.bits, mask)

    def _probability(self) -> float:
        """The probability with which a value of the input is quantised now."""
        training, frozen = self.module.training, self.view.phase == FROZEN
        noise, start = self.view.noise, self.lines.start
        if not training or (frozen and not start):
            return float(frozen)
        update = self.view.clock.time()[0]
        if update < start:
            return 0.0
        return 1.0 if frozen else 0.0 if noise.kind == "none" else noise.at(update)

    def _mask(self, x: Tensor, p: float) -> Tensor:
        clock = self.view.clock
        seed = seed_of(clock.seed, *clock.time(), clock.rank, f"{self.name}.input")
        return bernoulli(x.numel(), p, seed, x.device).view(x.shape)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> bool:
        """Move a range towards the ends of x, unless x is empty, holds NaN or Inf, or is computed again in a
        backward pass; whether it was looked at.
        """
        again = torch._C._current_graph_task_id() != -1 or torch._C._are_functorch_transforms_active()
        if again or not x.numel():
            return False
        low, high = span(x, x.dim())
        # abs: the bits of -0.0 are negative
        seen = torch.stack([-low, high]).flatten().float().clamp_(min=0).abs_()
        old, momentum = self._values(), self.lines.momentum
        moved = old + (1 - (MOMENTUM if momentum is None else momentum)) * (seen - old)
        new = torch.where(old.isnan(), seen, moved).view(torch.int32).long()
        self.stored.copy_(torch.where(seen.isfinite().all(), new, self.stored))
        return True

    def _values(self) -> Tensor:
        """(-low, high), fp32 [2]; NaN before anything was seen."""
        return self.stored.int().view(torch.float32)

    def _ends(self) -> tuple[Tensor, Tensor]:
        """(low, high), fp32 scalars."""
        low, high = self._values()
        return -low, high


def views_for(match: Match, view: WeightView) -> Iterator[ActivationView]:
    """One for each layer that a rule with `activations` takes, tied ones too, that has none yet; a table of
    embeddings has no input to quantise.
    """
    for owner in match.owners if match.rule.activations else ():
        if takes_numbers(owner.module) and "_qn_activation" not in owner.module.__dict__:
            yield ActivationView(match.rule.activations, view, owner)


def takes_numbers(module: nn.Module) -> bool:
    """Whether a module is of a kind whose input is numbers that a rule may quantise."""
    return isinstance(module, (nn.Linear, nn.Conv2d)) or is_conv1d(module)
