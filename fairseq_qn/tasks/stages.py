"""What only fairseq asks of stages: its options, ends of training, and scores that compare."""

from __future__ import annotations

import logging
import sys
from math import inf
from typing import Any

from fairseq import checkpoint_utils

from fairseq_qn.errors import RecipeError
from fairseq_qn.models.config import elsewhere
from fairseq_qn.modules import stages
from fairseq_qn.modules.stages import Boundaries
from fairseq_qn.recipe import Recipe

logger = logging.getLogger(__name__)

OPTIONS = {unit: f"--quant-stage-{unit}" for unit in ("updates", "epochs")}


def boundaries(recipe: Recipe, config: Any) -> Boundaries:
    """When each stage is frozen: from the options, else from the recipe. Raises RecipeError."""
    given = {unit: _numbers(getattr(config, f"quant_stage_{unit}", None), OPTIONS[unit]) for unit in OPTIONS}
    return stages.boundaries(recipe, **given, called=tuple(OPTIONS.values()))


def _numbers(text: Any, option: str) -> list[int] | None:
    if not text:
        return None
    try:
        return [int(part) for part in str(text).strip("[]").split(",")]
    except ValueError:
        raise RecipeError(f"{option}: expected numbers separated by commas, found {text!r}") from None


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
                "would be trained after the stage; freeze it earlier, or raise --total-num-update"
            )


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
