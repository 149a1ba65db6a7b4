"""All views of a recipe put into a model, and taken off again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from fairseq_qn.errors import NoLayerMatched, UnsupportedError
from fairseq_qn.modules import activations
from fairseq_qn.modules.activation_view import ActivationView, views_for
from fairseq_qn.modules.clock import Clock, track, untrack
from fairseq_qn.modules.folding import Fold
from fairseq_qn.modules.graph import Graph
from fairseq_qn.modules.install import StoredParameters, install, uninstall
from fairseq_qn.modules.match import Coverage, Match, match
from fairseq_qn.modules.view import FROZEN, WeightView, views_of
from fairseq_qn.recipe import Recipe


def install_all(model: nn.Module, recipe: Recipe, seed: int | None, strict: bool) -> Coverage:
    """See `fairseq_qn.apply`."""
    clocks = [module.__dict__["_qn_clock"] for module in model.modules() if "_qn_clock" in module.__dict__]
    if any(clock.recipe != recipe for clock in clocks):
        raise UnsupportedError(
            "apply: the model, a part of it or one that it is a part of carries the views of another "
            "recipe; build it anew"
        )
    matches, coverage = match(model, recipe, strict=strict)
    known = "_qn_clock" in model.__dict__
    clock = clocks[0] if clocks else Clock(torch.initial_seed() if seed is None else seed, recipe)
    views = [_view_of(m) for m in matches]
    made: list[WeightView] = []
    inputs: list[ActivationView] = []
    try:
        for i, m in enumerate(matches):
            if views[i] is None:
                own, noise = m.owner, recipe.noise_of(m.rule)
                views[i] = WeightView(own.key, m.rule, noise, own.module, clock)
                made.append(views[i])
            for placed in views_for(m, views[i]):
                inputs.append(placed)
        _fold(model, matches, views, strict)
    except Exception:
        for view in (*made, *inputs):
            view.clear()
        raise
    for m, view in zip(matches, views, strict=True):
        for owner in m.owners:
            install(owner.module, owner.attribute, view)
            if owner.module is view.home:
                view.keys = owner.keys
                if not known:  # its parts may have named their layers alike
                    view.name = owner.key
            placed = owner.module.__dict__.get("_qn_activation")
            if isinstance(placed, ActivationView) and not known:
                placed.name = owner.name
    for view in views_of(model):
        view.clock = clock
    track(model, clock)
    activations.place(model, {placed.name: placed for placed in inputs})  # after the clock's hooks
    for module in model.modules():
        module.__dict__["get_parameter"] = StoredParameters(module)
    return coverage


@torch.no_grad()
def uninstall_all(model: nn.Module) -> int:
    """Take the views off a model, in place, and return how many there were.

    The Parameters stay, those of frozen layers with the values that were read. Nothing changes if an error
    is raised: UnsupportedError where a module outside of the model reads one of its weights.
    """
    views = list(views_of(model))
    carriers = [module for module in model.modules() if "_qn_views" in module.__dict__]
    inside = Counter(id(view) for module in carriers for view in module._qn_views.values())
    for view in views:
        if inside[id(view)] != view.readers:
            raise UnsupportedError(
                f"{view.name}: is read by a module outside of this one too; remove the views of the whole "
                "model"
            )
    decoded = [(view, view.quantized()) for view in views if view.phase == FROZEN]
    activations.remove(model)
    for module in carriers:
        uninstall(module)
    for view, weight in decoded:
        view.weight.copy_(weight)
    for view in views:
        view.unwatch()
    untrack(model)
    for module in model.modules():
        module.__dict__.pop("get_parameter", None)
    return len(views)


def _fold(model: nn.Module, matches: list[Match], views: list[Any], strict: bool) -> None:
    """Give views whose rule says so the batch norm that follows their layer, and reads no tied weight."""
    asked = [(m, view) for m, view in zip(matches, views, strict=True) if m.rule.fold_batch_norm]
    norms = Graph(model, "fold_batch_norm").convolutions() if asked else {}
    for m, view in asked:
        norm = norms.get(m.owner.module)
        if len(m.owners) == 1 and norm is not None and norm.weight is not None:
            view.fold = Fold(norm)
    for rule in {id(m.rule): m.rule for m, _ in asked}.values() if strict else ():
        if not any(view.fold for m, view in asked if m.rule is rule):
            raise NoLayerMatched(
                f"rule {rule.layers!r}: fold_batch_norm: none of its layers is a Conv2d that a batch norm "
                "alone reads; take the line out"
            )


def _view_of(match: Match) -> WeightView | None:
    """The view that a matched Parameter has already, by whichever owner."""
    views = (owner.module.__dict__.get("_qn_views", {}).get(owner.attribute) for owner in match.owners)
    return next((view for view in views if view is not None), None)
