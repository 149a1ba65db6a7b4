"""An optimizer as the clock of the noise: its steps are the updates, passes between the micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fairseq_qn.errors import UnsupportedError
from fairseq_qn.modules.clock import Clock
from fairseq_qn.modules.freeze import refresh_due
from fairseq_qn.modules.undecayed import spare
from fairseq_qn.modules.view import views_of

STARTED = -1  # for refresh_due: no micro-batch, so that only what is lacking is learned


def follow(model: nn.Module, optimizer: torch.optim.Optimizer, update: int = 0) -> RemovableHandle:
    """Let the noise of `model` go by the optimizer's steps: p by its knots, exact noise refreshed every
    `refresh` updates. `Stages` does this, and freezes.

    update: steps made before, where training resumes: the same number draws the same masks. Steps that a
    gradient scaler leaves out do not count. Of several optimizers give the one that steps last. A second
    call takes the first one's place, set_update's too. The handle's remove() stops the count. Codes that
    exact noise lacks are learned here. Raises UnsupportedError for a model without views or what is no
    optimizer, NonFiniteWeight.
    """
    clocks = clocks_of(model, [optimizer], "follow")
    spare(model, [optimizer])
    handle = lead(clocks, optimizer, update, lambda now: refresh_due(list(views_of(model)), now))
    refresh_due(list(views_of(model)), update, STARTED)
    return handle


def clocks_of(model: nn.Module, optimizers: Sequence[Any], verb: str) -> list[Clock]:
    """The clocks of a model's views, usually one. Raises UnsupportedError, after the name of who asks."""
    views = list(views_of(model))
    strange = [type(o).__name__ for o in optimizers if not isinstance(o, torch.optim.Optimizer)]
    if not views or not optimizers or strange:
        found = ", ".join(strange) or f"{len(optimizers)} optimizers"
        raise UnsupportedError(
            f"{verb}: expected a model that fairseq_qn.apply has given views and a torch optimizer, "
            f"found {type(model).__name__} with {len(views)} views and {found}"
        )
    return list({id(view.clock): view.clock for view in views}.values())


def lead(
    clocks: Sequence[Clock], optimizer: torch.optim.Optimizer, update: int, begin: Callable[[int], None]
) -> RemovableHandle:
    """Let `update` begin, and with each of the optimizer's steps the next, when begin(update) is called."""

    def stepped(*_: Any) -> None:
        # a gradient scaler has a fused optimizer itself leave the step out
        if getattr(optimizer, "found_inf", None):
            return
        now = clocks[0].update + 1
        for clock in clocks:
            clock.step(now)
        begin(now)

    handle = optimizer.register_step_post_hook(stepped)
    for clock in clocks:
        clock.step(update)
        if clock.followed is not None:
            clock.followed.remove()
        clock.followed = handle
    return handle
