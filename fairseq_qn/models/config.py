"""Reading and writing fairseq's configuration, whichever of its shapes it has."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict


def config_of(task: Any) -> Any:
    """The options of a task; None where it has none."""
    return getattr(task, "cfg", None) or getattr(task, "args", None)


def remember(config: Namespace | DictConfig, group: str, key: str, value: Any) -> None:
    """Set an option here and in the trainer's configuration, of which this may be a merged copy."""
    setattr(config, key, value)
    whole = _whole(config)
    if whole is not None and OmegaConf.is_config(whole.get(group)):
        with open_dict(whole[group]):
            whole[group][key] = value


def elsewhere(config: Any, option: str) -> Any:
    """An option of another group, from the whole configuration; None where this one stands alone.

    Not interpolated into the task's own: fairseq-generate's parser takes the text of an interpolation for
    True.
    """
    whole = _whole(config)
    return None if whole is None else OmegaConf.select(whole, option)


def seed_of(config: Any) -> int:
    """fairseq's --seed. Not every task has an option of that name; a Namespace holds those of all groups."""
    own = getattr(config, "seed", None)
    return int((elsewhere(config, "common.seed") if own is None else own) or 0)


def _whole(config: Any) -> Any:
    """The configuration that a group of options is a part of, if any."""
    return config._get_parent() if OmegaConf.is_config(config) else None
