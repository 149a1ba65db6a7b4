"""fairseq_qn: train with quantisation noise, quantise in stages, ship one small file.

The public names are loaded when they are asked for, so that importing the package takes milliseconds. It
registers its models, tasks and criterion with fairseq once fairseq is loaded, before or after it; the verbs
work on any `nn.Module` without fairseq.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from fairseq_qn import plugin
from fairseq_qn.version import __version__  # noqa: F401

if TYPE_CHECKING:
    from fairseq_qn.api import (
        Stages,
        apply,
        decoded_state_dict,
        figures,
        follow,
        freeze,
        inspect,
        load,
        parameter_groups,
        predict_size,
        prune,
        refresh,
        remove,
        save,
        sensitivity,
        set_update,
        share,
        size_penalty,
    )  # fmt: skip
    from fairseq_qn.recipe import Recipe

__all__ = [
    "Recipe", "Stages", "apply", "decoded_state_dict", "figures", "follow", "freeze", "inspect", "load",
    "parameter_groups", "predict_size", "prune", "refresh", "remove", "save", "sensitivity", "set_update",
    "share", "size_penalty",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in __all__:
        value = getattr(import_module(f"{__name__}.{'recipe' if name == 'Recipe' else 'api'}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and find_spec(f"{__name__}.{name}") is not None:  # fairseq_qn.hub
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


plugin.attach()
