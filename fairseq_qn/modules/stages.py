"""What is due when: the rules of the stages, for fairseq's tasks and for a plain torch loop.

The stage is read from the model's own buffers, so no counter can skip or repeat one: whatever is due and not
frozen yet is frozen, by the same rule on resume.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fairseq_qn.errors import MismatchError, RecipeError, UnsupportedError
from fairseq_qn.modules.follow import STARTED, clocks_of, lead
from fairseq_qn.modules.freeze import LayerReport, Progress, freeze_views, refresh_due, refresh_views
from fairseq_qn.modules.moments import project_moments
from fairseq_qn.modules.undecayed import spare
from fairseq_qn.modules.view import FLOAT, FROZEN, WeightView, views_of
from fairseq_qn.recipe import Recipe

logger = logging.getLogger(__name__)

# stage -> (unit, number): frozen after this update, or as this epoch begins
Boundaries = dict[str, tuple[str, int]]


def boundaries(
    recipe: Recipe,
    updates: Sequence[int] | None = None,
    epochs: Sequence[int] | None = None,
    called: tuple[str, str] = ("updates", "epochs"),
) -> Boundaries:
    """When each stage is frozen: by the numbers given, one for each stage in the recipe's order, else by the
    recipe's own; a stage without a number is not in it.

    called: the names under which a user gave the numbers, for errors. Raises RecipeError for numbers that do
    not fit the stages, and for both kinds at once.
    """
    if updates is not None and epochs is not None:
        raise RecipeError(f"{called[0]} and {called[1]}: give one of the two")
    names = [stage.name for stage in recipe.stages]
    for unit, numbers, name in zip(("update", "epoch"), (updates, epochs), called, strict=True):
        if numbers is not None:
            found: list[Any] = list(numbers) if isinstance(numbers, (list, tuple, range)) else [numbers]
            whole = all(type(number) is int and number >= 0 for number in found)
            if not whole or len(found) != len(names) or found != sorted(found):
                raise RecipeError(
                    f"{name}: expected {len(names)} rising numbers, for stages {names}, found {numbers!r}"
                )
            return {stage: (unit, number) for stage, number in zip(names, found, strict=True)}
    own: Boundaries = {}
    for stage in recipe.stages:
        if stage.update is not None:
            own[stage.name] = ("update", stage.update)
        elif stage.epoch is not None:
            own[stage.name] = ("epoch", stage.epoch)
    return own


def due(boundaries: Boundaries, *, update: int = -1, epoch: int = -1) -> list[str]:
    """The stages that are to be frozen after `update` updates, or in this epoch, in the recipe's order."""
    now = {"update": update, "epoch": epoch}
    return [stage for stage, (unit, number) in boundaries.items() if now[unit] >= number]


def unfrozen(model: nn.Module, recipe: Recipe) -> list[str]:
    """The stages, in the recipe's order, that have a layer left to freeze."""
    left = {view.rule.stage for view in views_of(model) if view.phase != FROZEN}
    return [stage.name for stage in recipe.stages if stage.name in left]


def explain(left: Sequence[str], boundaries: Boundaries) -> str:
    """Stages that are not frozen, each with the reason."""
    when = {"update": "is due after update", "epoch": "is due at epoch"}
    numbered = [
        f"{stage} {when[boundaries[stage][0]]} {boundaries[stage][1]}"
        for stage in left
        if stage in boundaries
    ]
    bare = [stage for stage in left if stage not in boundaries]
    return "; ".join([*numbered, *([f"{', '.join(bare)}: no update or epoch was given"] if bare else [])])


@dataclass(frozen=True)
class Frozen:
    """A stage that has just been frozen; its text is a line for the log."""

    stage: str
    views: list[WeightView]
    reports: list[LayerReport]

    def __str__(self) -> str:
        worst = max(self.reports, key=lambda report: report.error)
        seconds = sum(report.seconds for report in self.reports)
        return (
            f"stage {self.stage} frozen: {len(self.reports)} layers in {seconds:.1f} s, "
            f"largest relative error {worst.error:.4f} ({worst.name})"
        )


def freeze_due(
    model: nn.Module, stages: Iterable[str], iterations: int, progress_of: Callable[[str], Progress | None]
) -> Iterator[Frozen]:
    """Freeze those of the stages that are not frozen yet, one at a time.

    Whoever calls has to have the moments of what was frozen projected before the next step. progress_of:
    stage -> its progress bar. Raises NonFiniteWeight, with that stage as it was.
    """
    for stage in stages:
        views = [view for view in views_of(model) if view.rule.stage == stage and view.phase != FROZEN]
        if views:
            reports = freeze_views(views, iterations=iterations, progress=progress_of(stage))
            yield Frozen(stage, views, reports)


def refresh_epoch(model: nn.Module, progress: Progress | None = None) -> None:
    """Learn the codes of exact noise whose `refresh` is an epoch."""
    refresh_views([view for view in views_of(model) if view.noise.refresh == "epoch"], progress=progress)


class Stages:
    """The stages of a plain torch loop: its optimizer's steps are the updates, and call for nothing else.

        stages = fairseq_qn.Stages(model, optimizer, updates=[200, 300, 400])
        for batch in data:
            loss(model, batch).backward()
            optimizer.step()  # freezes what is due
            optimizer.zero_grad()

    After a step, and so never while gradients are being accumulated, what is due is frozen, Adam's moments
    of it become those of its codewords, and exact noise is refreshed. p goes by its knots. `follow` does the
    last two alone; a second Stages or `follow` takes the place of the first.

    updates, epochs: the number of steps after which, or the epoch at whose beginning, each stage of the
    recipe is frozen, in the recipe's order; without them the recipe's own numbers. Epochs have to be told
    of, by `begin_epoch`. optimizer: one, or several in the order in which they step; those of the last are
    the updates. update: steps made before, for a model and optimizers that have been loaded already;
    `state_dict` resumes to the bit. reports: of all layers frozen here.

    Raises RecipeError for numbers that do not fit the stages, and where there are none, UnsupportedError for
    a model without views, or with those of several recipes, and for what is no optimizer. NonFiniteWeight
    may come out of any step.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        updates: Sequence[int] | None = None,
        epochs: Sequence[int] | None = None,
        update: int = 0,
        iterations: int = 20,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.iterations, self.progress = model, iterations, progress
        given: Any = optimizer
        self.optimizers: list[Optimizer] = [*given] if isinstance(given, (list, tuple)) else [given]
        clocks = clocks_of(model, self.optimizers, "Stages")
        self._clock, recipe = clocks[0], clocks[0].recipe
        if recipe is None or len(clocks) > 1:
            raise UnsupportedError(
                f"Stages: expected a model to which a recipe was applied, found {len(clocks)} such parts of "
                "it; give each Stages of its own"
            )
        self.recipe = recipe
        self.boundaries = boundaries(recipe, updates, epochs, ("Stages: updates", "Stages: epochs"))
        if not self.boundaries:
            raise RecipeError(
                f"Stages: nothing says when {', '.join(stage.name for stage in recipe.stages)} are frozen; "
                "give updates=[...] or epochs=[...], or for noise alone call fairseq_qn.follow"
            )
        self.reports: list[LayerReport] = []
        self.epoch = self._refreshed = 0
        self._warned = False
        spare(model, self.optimizers)
        lead(clocks, self.optimizers[-1], update, self._begin_update)
        self._freeze()
        # the first epoch need not learn them again
        lacking = any(view.needs_learning and view.phase == FLOAT for view in views_of(model))
        self._learned = update if lacking else -1
        refresh_due(list(views_of(model)), update, STARTED)

    @property
    def left(self) -> list[str]:
        """The stages that are not frozen yet, in the recipe's order."""
        return unfrozen(self.model, self.recipe)

    def __str__(self) -> str:
        left = self.left
        frozen = [stage.name for stage in self.recipe.stages if stage.name not in left]
        waiting = explain(left, self.boundaries) if left else "none"
        return f"update {self._clock.update}: frozen: {', '.join(frozen) or 'none'}; not frozen: {waiting}"

    def begin_epoch(self, epoch: int) -> None:
        """An epoch begins: freeze what is due by it, and refresh exact noise whose `refresh` is an epoch.

        While gradients are being accumulated, this waits for the step. An epoch that has begun before, as
        where training resumes within one, does not begin again.
        """
        self.epoch = epoch
        if self._clock.micro < 0:  # no training pass since the last step
            self._begin_epoch()

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint needs beside the other states: the numbers that the noise is drawn by."""
        clock = self._clock
        return {
            "seed": clock.seed, "update": clock.update, "micro": clock.micro, "epoch": self.epoch,
            "refreshed": self._refreshed,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from a checkpoint whose model and optimizers are, or are going to be, loaded.

        Nothing is frozen here; what is due and not frozen in the model is, after the next step. Raises
        MismatchError.
        """
        least = dict.fromkeys(self.state_dict(), 0) | {"seed": None, "micro": -1}
        if (
            not isinstance(state, Mapping)
            or state.keys() != least.keys()
            or any(type(state[key]) is not int for key in least)
            or any(low is not None and state[key] < low for key, low in least.items())
        ):
            raise MismatchError(
                f"Stages: expected what state_dict gave, numbers named {', '.join(least)}, found {state!r}"
            )
        self._clock.step(state["update"])
        self._clock.seed, self._clock.micro = state["seed"], state["micro"]
        self.epoch, self._refreshed = state["epoch"], state["refreshed"]

    def _begin_update(self, update: int) -> None:
        self._begin_epoch()
        refresh_due(list(views_of(self.model)), update)

    def _begin_epoch(self) -> None:
        self._freeze()
        if self._refreshed != self.epoch:
            if self._clock.update != self._learned:
                refresh_epoch(self.model, self.progress)
            self._refreshed = self.epoch

    def _freeze(self) -> None:
        update = self._clock.update
        names = due(self.boundaries, update=update, epoch=self.epoch)
        for frozen in freeze_due(self.model, names, self.iterations, lambda _: self.progress):
            left = project_moments(self.optimizers, frozen.views)[1]
            if left and not self._warned:
                self._warned = True
                warnings.warn(f"Stages: {left}", stacklevel=2)
            self.reports += frozen.reports
            logger.info("update %d: %s", update, frozen)
