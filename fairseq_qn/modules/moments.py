"""Adam's moments when a weight is frozen as product codes.

From then on each block's gradient is the mean over its cluster of |J| blocks. If the blocks' gradients are
independent, that mean is some sqrt(|J|) smaller than one of them, but the second moment still remembers
single blocks, and codewords would hardly move until it forgets: 1 / (1 - beta2) updates. So both moments
become those of the mean: exp_avg is projected onto the clusters, exp_avg_sq is its projection / |J|. All
blocks of a cluster then share their moments, and so move together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from fairseq_qn.modules.view import WeightView

# moment -> is it one of squares. Adam, AdamW, NAdam, RAdam of torch, the Adams of fairseq and apex; amsgrad
# has the third
MOMENTS = {"exp_avg": False, "exp_avg_sq": True, "max_exp_avg_sq": True}
# Parameter -> (what the optimizer has in its place, where it begins there)
Masters = Mapping[Tensor, tuple[Tensor, int]]


@torch.no_grad()
def project_moments(
    optimizers: Iterable[Optimizer], views: Iterable[WeightView], masters: Masters | None = None
) -> tuple[list[str], str]:
    """Make the moments of views that have just been frozen those of their codewords, in place.

    To be called once for each freeze, before the next step. Integers have no codewords: their gradient and
    moments stay.
    masters: where the optimizer trains fp32 copies, flattened into one or not, in place of the Parameters.
    Returns the names of the views handled, and a line on what was left alone, or "". No moments yet: nothing
    to do.
    """
    optimizers, masters = list(optimizers), masters or {}
    trained_by = {
        p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    }
    handled, left, kinds = [], 0, {type(optimizer).__name__ for optimizer in optimizers}
    for view in views:
        if not view.scheme.shares_gradients:
            continue
        master, offset = masters.get(view.weight, (view.weight, 0))
        if master not in trained_by:
            left += 1
            continue
        state, defaults = trained_by[master].state.get(master, {}), trained_by[master].defaults
        found = {
            key: state[key] for key in MOMENTS if getattr(state.get(key), "shape", None) == master.shape
        }
        if {"exp_avg", "exp_avg_sq"} <= found.keys():
            for key, moment in found.items():
                _project(moment, offset, view, squared=MOMENTS[key])
            handled.append(view.name)
        elif state or "betas" not in defaults:
            left += 1
    note = f"no moments of Adam for {left} frozen layers; what it keeps of them is left as it is"
    return handled, f"{', '.join(sorted(kinds))}: {note}" if left else ""


def _project(moment: Tensor, offset: int, view: WeightView, *, squared: bool) -> None:
    shape = view.weight.shape
    if moment.shape != shape:  # of a flat master
        moment = moment[offset : offset + view.weight.numel()].view(shape)
    present = moment.to(view.weight.device)  # the state may be offloaded
    moment.copy_(view.turned(view.scheme.moment(view.turned(present), view, squared=squared)))
