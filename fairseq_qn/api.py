"""apply, freeze, save, load, inspect: what everything else, and every user, calls."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fairseq_qn.errors import RecipeError, UnsupportedError
from fairseq_qn.modules.clock import Clock, Tick
from fairseq_qn.modules.freeze import LayerReport, Progress, freeze_views, refresh_views
from fairseq_qn.modules.match import Coverage, match
from fairseq_qn.modules.view import CODED, FROZEN, WeightView, install, views_of
from fairseq_qn.recipe import Recipe

__all__ = ["apply", "freeze", "refresh", "set_update"]


def apply(model: nn.Module, recipe: Recipe | Mapping[str, Any] | str | Path, *, seed: int = 0, strict: bool = True) -> Coverage:
    """Install weight views on the layers that the recipe names, in place.

    Applying the same recipe again covers layers that the model has gained since. Nothing changes if an error is raised:
    RecipeError, NoLayerMatched (unless not `strict`), BlockSizeError, or UnsupportedError where other views are in place.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    before = recipe_of(model)
    if before is not None and before != recipe:
        raise UnsupportedError("apply: the model carries the views of another recipe; build it anew")
    matches, coverage = match(model, recipe, strict=strict)
    clock = model._qn_clock if before is not None else Clock(seed)
    new = [m for m in matches if m.home.attribute not in m.home.module.__dict__.get("_qn_views", {})]
    made: list[WeightView] = []
    try:
        for m in new:
            made.append(WeightView(m.home.key, m.rule, recipe.noise_of(m.rule), m.home.module, m.home.attribute, clock))
    except Exception:
        for view in made:
            for name in view.buffer_names:
                del view.home._buffers[name]
        raise
    for m, view in zip(new, made, strict=True):
        for owner in m.owners:
            install(owner.module, owner.attribute, view)
    if before is None:
        model._qn_clock, model._qn_recipe = clock, recipe
        model.register_forward_pre_hook(Tick(clock))
    return coverage


def recipe_of(model: nn.Module) -> Recipe | None:
    """The recipe that was applied to this model, if any."""
    return model.__dict__.get("_qn_recipe")


def freeze(model: nn.Module, stage: str | None = None, *, iterations: int = 20, progress: Progress | None = None) -> list[LayerReport]:
    """Quantise the layers of one stage, or all that are left, and keep training or evaluate them quantised.

    The dense Parameters stay; product codes are fixed and codebooks follow the Parameters. Returns a report per layer.
    Raises RecipeError for an unknown stage, NonFiniteWeight (before anything is changed), UnsupportedError.
    """
    recipe = _applied(model, "freeze")
    names = [s.name for s in recipe.stages]
    if stage is not None and stage not in names:
        raise RecipeError(f"freeze: stage: expected one of {names}, found {stage!r}")
    views = [view for view in views_of(model) if stage in (None, view.rule.stage)]
    return freeze_views(views, iterations=iterations, progress=progress)


def refresh(model: nn.Module, *, progress: Progress | None = None) -> list[LayerReport]:
    """Learn the codebooks of exact noise from the present weights. A no-op where no rule uses exact noise."""
    _applied(model, "refresh")
    return refresh_views(list(views_of(model)), progress=progress)


def set_update(model: nn.Module, n: int, micro: int = 0) -> None:
    """Say which update and micro-batch the noise belongs to: the same numbers draw the same masks.

    Exact noise whose `refresh` is a number of updates is refreshed here, at the first micro-batch of its updates.
    """
    views = list(views_of(model))
    for clock in {id(view.clock): view.clock for view in views}.values():
        clock.pin(n, micro)
    exact = [view for view in views if view.needs_codes and view.phase != FROZEN]
    due = [v for v in exact if v.phase != CODED or (micro == 0 and v.noise.refresh != "epoch" and n % v.noise.refresh == 0)]
    refresh_views(due)


def _applied(model: nn.Module, verb: str) -> Recipe:
    recipe = recipe_of(model)
    if recipe is None:
        raise UnsupportedError(f"{verb}: the model carries no recipe; call fairseq_qn.apply(model, recipe) first")
    return recipe
