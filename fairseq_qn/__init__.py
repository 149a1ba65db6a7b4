"""fairseq_qn: train with quantisation noise, quantise in stages, ship one small file.

Importing the package registers its models, tasks and criterion with fairseq where fairseq is installed; the
verbs work on any `nn.Module` without it.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec

from fairseq_qn.api import (
    Stages,
    apply,
    decoded_state_dict,
    figures,
    follow,
    freeze,
    inspect,
    load,
    predict_size,
    refresh,
    remove,
    save,
    set_update,
)  # fmt: skip
from fairseq_qn.recipe import Recipe
from fairseq_qn.version import __version__  # noqa: F401

__all__ = [
    "Recipe", "Stages", "apply", "decoded_state_dict", "figures", "follow", "freeze", "inspect", "load",
    "predict_size", "refresh", "remove", "save", "set_update",
]  # fmt: skip

if find_spec("fairseq") is not None:
    _logger = logging.getLogger("fairseq")
    _level = _logger.level
    _logger.setLevel(logging.WARNING)  # fairseq's import talks about optional extras of other tasks
    try:
        # fairseq imports tasks/ and models/ of a --user-dir, not criterions/, and nothing if the package is
        # imported already.
        from fairseq_qn import criterions, hub, models, tasks  # noqa: F401
        from fairseq_qn.tasks import checkpoint_classes
    finally:
        _logger.setLevel(_level)
    checkpoint_classes.allow()
