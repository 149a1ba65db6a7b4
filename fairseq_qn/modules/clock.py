"""Which noise a forward pass draws: (seed, update, micro-batch, rank), and what lasts as long as the pass does; shared by
all views of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass
class Clock:
    """Time as the noise sees it. Until `pinned` by set_update, each training forward of the root module is an update.

    values: what shared views have read in the present forward pass of the root module; None between passes.
    """

    seed: int = 0
    update: int = 0
    micro: int = 0
    pinned: bool = False
    values: dict[str, Any] | None = None

    def pin(self, update: int, micro: int) -> None:
        """Set the update and micro-batch by hand, from now on."""
        self.update, self.micro, self.pinned = update, micro, True

    @property
    def started(self) -> bool:
        """Whether there was a training forward, or set_update: who reads a weight before is not training."""
        return self.pinned or self.update > 0

    @property
    def rank(self) -> int:
        """This process' rank, so that data-parallel workers draw different masks."""
        on = torch.distributed.is_available() and torch.distributed.is_initialized()
        return torch.distributed.get_rank() if on else 0


class _Begin:
    """Forward pre-hook of the root module; an object, so that a deep copy of the model gets a clock of its own."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, module: nn.Module, args: tuple) -> None:
        self.clock.values = {}
        if module.training and not self.clock.pinned:
            self.clock.update += 1


class _End(_Begin):
    """Its forward hook, which runs whether the pass fails or not."""

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.clock.values = None


def follow(model: nn.Module, clock: Clock) -> None:
    """Let the clock know when the root module's forward passes begin and end."""
    model.register_forward_pre_hook(_Begin(clock))
    model.register_forward_hook(_End(clock), always_call=True)
