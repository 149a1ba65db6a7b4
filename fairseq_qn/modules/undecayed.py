"""What schemes learn beside a weight, a step or a logit, trained without weight decay.

Optimizers decay what they hold by the group, and fairseq makes one group of all, flattened under --fp16.
So around each of an optimizer's steps these Parameters, or their fp32 masters, stand at zero, which weight
decay leaves as it is: what the step leaves there is the update alone, which is then added to what they were;
of those with a learning rate of their own, in proportion to it.
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


def spare(
    model: nn.Module,
    optimizers: Iterable[Optimizer],
    masters: Masters | None = None,
    rate: float | None = None,
) -> None:
    """Let these optimizers train what the views of `model` learn beside their weights without weight decay.

    Once is enough, twice does no harm. masters: see `project_moments`. rate: the learning rate of the
    Parameters in `Scheme.rated_names`; by default the optimizer's. A step that is given a closure, which
    reads the model, is left alone.
    """
    learned = _learned(model)
    for optimizer in optimizers if learned else ():
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for p, rated in learned.items():
            master, begin = (masters or {}).get(p, (p, 0))
            if id(master) in held:
                kept = optimizer.__dict__
                kept["_qn_spared"] = kept.get("_qn_spared") or _Spared(optimizer)
                kept["_qn_spared"].parts[id(master), begin] = (
                    master, begin, begin + p.numel(), rate if rated else None
                )  # fmt: skip


class _Spared:
    """Parts of what an optimizer trains: (tensor, begin, end, learning rate of its own or None) each."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.parts: dict[tuple[int, int], tuple[Tensor, int, int, float | None]] = {}
        self.before: list[Tensor] = []
        optimizer.register_step_pre_hook(self._take)
        optimizer.register_step_post_hook(self._give)

    @torch.no_grad()
    def _take(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._give(optimizer)  # what a step that raised has left
        if any(map(callable, (*args[1:], *kwargs.values()))):
            return
        self.before = [part.clone() for part in self._present()]
        for part in self._present():
            part.zero_()

    @torch.no_grad()
    def _give(self, optimizer: Optimizer, *args: Any) -> None:
        used = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        for part, before, (tensor, *_, own) in zip(self._present(), self.before, self.parts.values()):
            if own is not None:
                part.mul_(own / used[id(tensor)] if used[id(tensor)] else 0)
            part.add_(before)
        self.before = []

    def _present(self) -> Iterable[Tensor]:
        return (tensor.view(-1)[begin:end] for tensor, begin, end, _ in self.parts.values())


def parameter_groups(model: nn.Module, lr: float | None = None) -> list[dict[str, Any]]:
    """A model's Parameters as groups for one of torch's optimizers: the logits of learned bits at the
    learning rate `lr`, by default the optimizer's, whatever else is learned beside a weight, and the rest;
    all but the rest without weight decay.
    """
    learned = _learned(model)
    rated = {"weight_decay": 0.0} | ({} if lr is None else {"lr": lr})
    groups = [
        {"params": [p for p in model.parameters() if p not in learned]},
        {"params": [p for p, own in learned.items() if not own], "weight_decay": 0.0},
        {"params": [p for p, own in learned.items() if own], **rated},
    ]
    return [group for group in groups if group["params"]]


def _learned(model: nn.Module) -> dict[nn.Parameter, bool]:
    """What is learned beside weights, and whether it may have a learning rate of its own."""
    return {v.parameter(name): name in v.scheme.rated_names for v in views_of(model) for name in v.learned}
