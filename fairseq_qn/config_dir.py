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


def recipe_file(given: str) -> Path:
    """A recipe's file, given by its path or, where no file is so called, by the name of a ready one. Raises
    FileNotFoundError.

    >>> recipe_file("int8").name
    'int8.yaml'
    """
    path, ready = Path(given).expanduser(), shipped_recipes()
    if not path.exists() and given not in ready:
        raise FileNotFoundError(f"no such file, nor a ready recipe; those are {', '.join(ready)}")
    return path if path.exists() else ready[given]


def shipped_recipes() -> dict[str, Path]:
    """The ready recipes by name.

    >>> "roberta" in shipped_recipes()
    True
    """
    return {path.stem: path for path in sorted((config_dir() / "recipes").glob("*.yaml"))}
