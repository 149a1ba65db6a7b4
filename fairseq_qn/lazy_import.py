"""Modules that are loaded when something is first asked of them: torch takes a second, which what reads a
header or a recipe alone need not wait for.

importlib.util.LazyLoader loads at the second `import` of a module already, which asks for its __spec__.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


class _Lazy(ModuleType):
    """A module without contents, until it is asked for any: then the module itself, the same object."""

    def __getattr__(self, name: str) -> Any:
        spec: Any = self.__spec__
        self.__class__ = ModuleType
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        try:
            spec.loader.exec_module(self)
        except BaseException:
            sys.modules.pop(self.__name__, None)
            raise
        return getattr(self, name)


def postpone(*names: str) -> None:
    """Let `import` of these leave an empty module that fills when an attribute of it, or a submodule, is
    asked for. Those that are loaded, or not installed, stay so.
    """
    for name in names:
        if name not in sys.modules and (spec := find_spec(name)) is not None:
            module = module_from_spec(spec)
            vars(module).pop("__path__", None)  # which the import of a submodule asks for
            module.__class__ = _Lazy
            sys.modules[name] = module
