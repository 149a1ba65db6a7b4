"""Which noise a forward pass draws: (seed, update, micro-batch, rank), shared by all views of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Clock:
    """Time as the noise sees it. Until `pinned` by set_update, each training forward of the root module is an update."""

    seed: int = 0
    update: int = 0
    micro: int = 0
    pinned: bool = False

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


class Tick:
    """Forward pre-hook of the root module; an object, so that a deep copy of the model gets a clock of its own."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if module.training and not self.clock.pinned:
            self.clock.update += 1
