"""Where the ready recipes and Hydra groups are."""

from __future__ import annotations

from pathlib import Path


def config_dir() -> Path:
    """Folder of the shipped YAML files: `fairseq_qn/configs` as installed, `configs` at the top of a source
    tree.

    >>> config_dir().name
    'configs'
    """
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
