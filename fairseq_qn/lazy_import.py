"""Modules that are loaded when something is first asked of them: torch takes a second, for which what reads
a header or a recipe alone need not wait.

importlib.util.LazyLoader loads at the second `import` of a module already, which asks for its __spec__.
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


def postpone(*names: str) -> None:
    """From now on, `import` of these leaves an empty module, which fills when an attribute of it, or a
    submodule, is asked for. `package.*` means each module right below the package.
    """
    sys.meta_path.insert(0, _Finder(names))


class _Finder(MetaPathFinder):
    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = {*names}
        self.seen: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """As the other finders, but for the loader."""
        if name in self.seen or not self.names & {name, name.rpartition(".")[0] + ".*"}:
            return None
        self.seen.add(name)  # so that this finder does not find it itself
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Later(spec.loader)
        return spec


class _Later(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def exec_module(self, module: ModuleType) -> None:
        """Leave it empty."""
        module.__spec__.loader = module.__loader__ = self.loader  # type: ignore[union-attr]
        vars(module).pop("__path__", None)  # for which the import of a submodule asks
        module.__class__ = _Empty


class _Empty(ModuleType):
    def __getattr__(self, name: str) -> Any:
        """Become the module itself, the same object."""
        spec: Any = self.__spec__
        self.__class__ = ModuleType
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        try:
            spec.loader.exec_module(self)
        except BaseException:
            sys.modules.pop(spec.name, None)
            raise
        return getattr(self, name)
