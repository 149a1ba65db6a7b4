"""Learn codes for views: to freeze a stage, or to refresh the codebooks of exact noise.

With several processes each layer is learned by one of them and broadcast, so that all hold the same codes
and the time is shared out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from fairseq_qn.errors import NonFiniteWeight
from fairseq_qn.modules.digest import sign
from fairseq_qn.modules.view import CODED, FLOAT, FROZEN, WeightView
from fairseq_qn.quant.kmeans import count_nonfinite
from fairseq_qn.quant.noise import seed_of
from fairseq_qn.schemes import base

Progress = Callable[[Sequence[WeightView]], Iterable[WeightView]]


@dataclass(frozen=True)
class LayerReport:
    """What quantising one layer cost: `error` is ||W - W'||^2 / ||W||^2, `seconds` the time here (0 if
    another rank's).
    """

    name: str
    stage: str
    scheme: str
    n_weights: int
    error: float
    seconds: float


def freeze_views(
    views: Sequence[WeightView], *, iterations: int = 20, progress: Progress | None = None
) -> list[LayerReport]:
    """Quantise these views and leave them FROZEN; views that are frozen already are passed over.

    Every weight is looked at before any view changes, so that NonFiniteWeight leaves the model as it was.
    """
    views = [view for view in views if view.phase != FROZEN]
    for view in views:
        _check_finite(view)
    reports = _learn_all(views, iterations, progress)
    for view in views:
        view.phase = FROZEN
    return reports


def refresh_views(
    views: Sequence[WeightView], *, iterations: int = 5, progress: Progress | None = None
) -> list[LayerReport]:
    """Learn the codes that exact noise draws on, from the present weights and the earlier codes."""
    views = [view for view in views if view.needs_learning and view.phase != FROZEN]
    for view in views:
        _check_finite(view)
    reports = _learn_all(views, iterations, progress)
    for view in views:
        view.phase = CODED
    return reports


def refresh_due(views: Sequence[WeightView], update: int, micro: int = 0) -> None:
    """Learn what exact noise lacks, and, as an update begins, what its `refresh` says is due."""
    refresh_views(
        [
            v for v in views if v.phase != CODED
            or (micro == 0 and v.noise.refresh != "epoch" and update % v.noise.refresh == 0)
        ]
    )  # fmt: skip


def distortion(view: WeightView) -> float:
    """||W - W'||^2 / ||W||^2 of a view under its present codes or integers."""
    return base.distortion(view.weight.detach(), view.quantized())


def _check_finite(view: WeightView) -> None:
    weight = view.weight.detach()
    if bad := count_nonfinite(weight.float()):
        where = " in fp32" if weight.dtype == torch.float64 else ""
        raise NonFiniteWeight(
            f"{view.name}: {bad} of {weight.numel()} weights are NaN or Inf{where}; nothing was frozen"
        )
    for name in view.learned:
        if not bool(torch.isfinite(view.parameter(name)).all()):
            raise NonFiniteWeight(f"{view.name}: its {name} hold NaN or Inf; nothing was frozen")


@torch.no_grad()
def _learn_all(views: Sequence[WeightView], iterations: int, progress: Progress | None) -> list[LayerReport]:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = torch.distributed.get_world_size() if distributed else 1
    rank = torch.distributed.get_rank() if distributed else 0
    seconds: dict[str, float] = {}
    errors: dict[str, float] = {}
    learner = _share_out(views, world)
    for view in progress(views) if progress else views:
        if learner[view.name] == rank:
            began = time.perf_counter()
            errors[view.name] = _learn(view, iterations)
            seconds[view.name] = time.perf_counter() - began
    if distributed:
        for view in views:
            for buffer in map(view.buffer, view.codes):
                torch.distributed.broadcast(buffer, learner[view.name])
                buffer.add_(0)  # a broadcast does not count as a write: tell caches that it changed
            sign(view)
        errors = _all_errors(views, errors)
    return [
        LayerReport(
            v.name, v.rule.stage, v.scheme.name, v.weight.numel(), errors[v.name], seconds.get(v.name, 0.0)
        )
        for v in views
    ]


def _all_errors(views: Sequence[WeightView], own: dict[str, float]) -> dict[str, float]:
    """The errors of all layers, each from the rank that learned it."""
    if not views:
        return {}
    errors = torch.tensor(
        [own.get(view.name, 0.0) for view in views], dtype=torch.float64, device=views[0].weight.device
    )
    torch.distributed.all_reduce(errors)
    return {view.name: error for view, error in zip(views, errors.tolist(), strict=True)}


def _share_out(views: Sequence[WeightView], world: int) -> dict[str, int]:
    """The rank that learns each view: largest first, each to the rank with the least to do."""
    load, learner = [0] * world, {}
    for view in sorted(views, key=lambda v: (-v.weight.numel(), v.name)):
        rank = load.index(min(load))
        load[rank] += view.weight.numel()
        learner[view.name] = rank
    return learner


def _learn(view: WeightView, iterations: int) -> float:
    """Learn a view's codes; returns its distortion."""
    seed, warm = seed_of(view.clock.seed, view.name) % 2**63, view.phase != FLOAT
    error = view.scheme.learn(view.matrix, view, warm, iterations, seed)
    sign(view)
    return error
