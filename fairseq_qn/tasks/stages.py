"""Which stage is frozen when, ends of training that leave one out, and scores that compare before with
after.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from math import inf
from typing import Any

from fairseq import checkpoint_utils

from fairseq_qn.errors import RecipeError
from fairseq_qn.models.quantised import elsewhere
from fairseq_qn.recipe import Recipe

logger = logging.getLogger(__name__)

# stage -> (unit, number): frozen after this update, or as this epoch begins
Boundaries = dict[str, tuple[str, int]]


def boundaries(recipe: Recipe, config: Any) -> Boundaries:
    """When each stage is frozen: from the options, else from the recipe; a stage without a number is not in
    it.

    Raises RecipeError for options that contradict one another or do not fit the stages.
    """
    names = [stage.name for stage in recipe.stages]
    given = {unit: getattr(config, f"quant_stage_{unit}s", None) for unit in ("update", "epoch")}
    if given["update"] and given["epoch"]:
        raise RecipeError("--quant-stage-updates and --quant-stage-epochs: give one of the two")
    for unit, text in given.items():
        if text:
            option = f"--quant-stage-{unit}s"
            try:
                numbers = [int(part) for part in str(text).strip("[]").split(",")]
            except ValueError:
                raise RecipeError(
                    f"{option}: expected numbers separated by commas, found {text!r}"
                ) from None
            if len(numbers) != len(names) or numbers != sorted(numbers):
                raise RecipeError(
                    f"{option}: expected {len(names)} rising numbers, for stages {names}, found {numbers}"
                )
            return {name: (unit, number) for name, number in zip(names, numbers, strict=True)}
    own = {
        s.name: ("update", s.update) if s.update is not None else ("epoch", s.epoch) for s in recipe.stages
    }
    return {name: at for name, at in own.items() if at[1] is not None}


def check_ends(due: Boundaries, config: Any) -> None:
    """Warn of a stage after the end of training, which a short trial of a long recipe may mean.

    Raises RecipeError for one with updates to come, all of them at a learning rate of 0.
    """
    last = {unit: elsewhere(config, f"optimization.max_{unit}") or 0 for unit in ("update", "epoch")}
    decayed = elsewhere(config, "lr_scheduler.total_num_update")  # polynomial_decay
    to_zero = decayed is not None and elsewhere(config, "lr_scheduler.end_learning_rate") == 0
    for stage, (unit, at) in due.items():
        # frozen at the beginning of the update or epoch that follows its number, if there is one
        if 0 < last[unit] < at + (unit == "update"):
            logger.warning(
                "stage %s: %s %d is not before the end of training (--max-%s %d), which leaves it unfrozen; "
                "`fairseq-qn compress` will freeze it without any training after", stage, unit, at, unit,
                last[unit]
            )  # fmt: skip
        elif to_zero and unit == "update" and at >= decayed:
            raise RecipeError(
                f"stage {stage}: update {at}: the learning rate is 0 from update {decayed:g} on, so nothing "
                "would be "
                "trained after the stage; freeze it earlier, or raise --total-num-update"
            )


def explain(left: Sequence[str], due: Boundaries) -> str:
    """Stages that are not frozen, each with the reason."""
    when = {"update": "is due after update", "epoch": "is due at epoch"}
    numbered = [f"{stage} {when[due[stage][0]]} {due[stage][1]}" for stage in left if stage in due]
    bare = [stage for stage in left if stage not in due]
    return "; ".join([*numbered, *([f"{', '.join(bare)}: no update or epoch was given"] if bare else [])])


def count_no_score(stats: dict[str, Any], config: Any) -> None:
    """Have fairseq take no score so far for the best: neither for checkpoint_best.pt nor for --patience.

    It keeps both in attributes of functions, and calls us between a validation and the comparisons.
    """
    forget_best()
    stats.pop(f"best_{elsewhere(config, 'checkpoint.best_checkpoint_metric')}", None)
    beyond = inf if elsewhere(config, "checkpoint.maximize_best_checkpoint_metric") else -inf
    checkpoint_utils.save_checkpoint.best = beyond


def forget_best() -> None:
    """The next score is the first that counts."""
    programs = [
        getattr(sys.modules.get(name), "should_stop_early", None)
        for name in ("fairseq_cli.train", "__main__")
    ]
    for function in (checkpoint_utils.save_checkpoint, *filter(None, programs)):
        vars(function).pop("best", None)
