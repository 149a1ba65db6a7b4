"""What schemes learn beside a weight, a step or a logit, trained without weight decay.

Optimizers decay what they hold by the group, and fairseq makes one group of all, flattened under --fp16.
So around each of an optimizer's steps these Parameters, or their fp32 masters, stand at zero, which weight
decay leaves as it is: what the step leaves there is the update alone, which is then added to what they were.
Groups, states and checkpoints stay as they are. Optimizers that scale an update by the Parameter's own size
(LAMB, Adafactor) do not see that size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fairseq_qn.modules.moments import Masters
from fairseq_qn.modules.view import views_of


def spare(model: nn.Module, optimizers: Iterable[Optimizer], masters: Masters | None = None) -> None:
    """Let these optimizers train what the views of `model` learn beside their weights without weight decay.

    Once is enough, twice does no harm. masters: see `project_moments`. A step that is given a closure, which
    reads the model, is left alone.
    """
    learned = [view.parameter(name) for view in views_of(model) for name in view.learned]
    for optimizer in optimizers if learned else ():
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for p in learned:
            master, begin = (masters or {}).get(p, (p, 0))
            if id(master) in held:
                kept = optimizer.__dict__
                kept["_qn_spared"] = kept.get("_qn_spared") or _Spared(optimizer)
                kept["_qn_spared"].parts[id(master), begin] = (master, begin, begin + p.numel())


class _Spared:
    """Parts of what an optimizer trains: (tensor, begin, end) each."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.parts: dict[tuple[int, int], tuple[Tensor, int, int]] = {}
        self.before: list[Tensor] = []
        optimizer.register_step_pre_hook(self._take)
        optimizer.register_step_post_hook(self._give)

    @torch.no_grad()
    def _take(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._give()  # what a step that raised has left
        if any(map(callable, (*args[1:], *kwargs.values()))):
            return
        self.before = [part.clone() for part in self._present()]
        for part in self._present():
            part.zero_()

    @torch.no_grad()
    def _give(self, *_: Any) -> None:
        for part, before in zip(self._present(), self.before):
            part.add_(before)
        self.before = []

    def _present(self) -> Iterable[Tensor]:
        return (tensor.view(-1)[begin:end] for tensor, begin, end in self.parts.values())
