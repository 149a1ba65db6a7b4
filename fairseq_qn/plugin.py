"""Registers the models, the tasks and the criterion with fairseq: at once where fairseq is loaded, else as
soon as it is. fairseq is never imported for that.

It is an import hook, so that the order of `import fairseq` and `import fairseq_qn` does not matter, and a
program that needs neither torch nor fairseq loads neither.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from fairseq_qn import uncaught


def attach() -> None:
    """Register now, or when fairseq is imported; never twice."""
    if sys.modules.get("fairseq") is not None:
        _register()
    elif not any(isinstance(finder, _Fairseq) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Fairseq())


class _Fairseq(MetaPathFinder):
    """Finds fairseq as the other finders do, and registers when it has been loaded."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """The spec of fairseq, whose loader registers afterwards."""
        if name != "fairseq":
            return None
        others = (f.find_spec for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        spec = next(filter(None, (find(name, path, target) for find in others)), None)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                with quiet():
                    load(module)
                sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not self]
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    with quiet():
        # fairseq itself imports tasks/ and models/ of a --user-dir, not criterions/, and nothing if the
        # package is imported already
        from fairseq_qn import criterions, models, tasks  # noqa: F401
    uncaught.attach()


@contextmanager
def quiet() -> Iterator[None]:
    """fairseq's import talks about optional extras of other tasks."""
    logger = logging.getLogger("fairseq")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
