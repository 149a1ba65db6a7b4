"""What newcomers leave out of a fairseq-train command: said in a line before training starts."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fairseq_qn.errors import MismatchError
from fairseq_qn.models.describe import label_names

logger = logging.getLogger(__name__)


def check_labels(task: Any, config: Any) -> None:
    """Raise MismatchError where --num-classes is not the number of labels in the data."""
    classes, labels = getattr(config, "num_classes", None), getattr(task, "label_dictionary", None)
    if classes is None or labels is None or getattr(config, "regression_target", False):
        return
    found = label_names(labels)
    if classes != len(found):
        names = ", ".join(found if len(found) < 4 else [*found[:3], "..."])
        raise MismatchError(
            f"--num-classes {classes}: {config.data} has {len(found)} labels ({names}); "
            f"give --num-classes {len(found)}"
        )


def say_tokens(config: Any) -> None:
    """Warn of sentences that do not begin or part as `predict` makes them."""
    if getattr(config, "init_token", 0) is None:
        logger.warning(
            "no --init-token: the head sees a sentence's first word in place of <s>, with which `predict` "
            "begins each sentence; add --init-token 0"
        )
    pair = Path(str(getattr(config, "data", ""))) / "input1"
    if getattr(config, "separator_token", 0) is None and pair.is_dir():
        logger.warning(
            "no --separator-token: nothing parts the sentences of a pair, but `predict` parts them by </s>; "
            "add --separator-token 2"
        )


def say_stages(boundaries: Any, names: list[str]) -> None:
    """Warn that noise is all that a recipe brings to this training."""
    if not boundaries:
        logger.warning(
            "no stage has an update or epoch: this training freezes nothing, `fairseq-qn compress` all at "
            "once; give --quant-stage-updates N,.. or --quant-stage-epochs N,.. for stages %s",
            ", ".join(names),
        )
