"""A plain loop's optimizer as the clock of the noise: its steps are the updates, passes between them the
micro-batches.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fairseq_qn.errors import UnsupportedError
from fairseq_qn.modules.freeze import refresh_due
from fairseq_qn.modules.view import views_of


def follow(model: nn.Module, optimizer: torch.optim.Optimizer, update: int = 0) -> RemovableHandle:
    """Let the noise of `model` go by the optimizer's steps: p by its knots, exact noise refreshed every
    `refresh` updates.

    update: steps made before, where training resumes: the same number draws the same masks. Steps that a
    gradient scaler leaves out do not count. Of several optimizers give the one that steps last. A second
    call takes the first one's place, set_update's too. The handle's remove() stops the count. Codes that
    exact noise lacks are learned here. Raises UnsupportedError for a model without views or what is no
    optimizer, NonFiniteWeight.
    """
    views = list(views_of(model))
    if not views or not isinstance(optimizer, torch.optim.Optimizer):
        raise UnsupportedError(
            "follow: expected a model that fairseq_qn.apply has given views and a torch optimizer, "
            f"found {type(model).__name__} with {len(views)} views and {type(optimizer).__name__}"
        )
    clocks = list({id(view.clock): view.clock for view in views}.values())
    numbers = count(update)

    def step(*_: Any) -> None:
        now = next(numbers)
        for clock in clocks:
            clock.step(now)
        refresh_due(list(views_of(model)), now)

    step()
    handle = optimizer.register_step_post_hook(step)
    for clock in clocks:
        if clock.followed is not None:
            clock.followed.remove()
        clock.followed = handle
    return handle
