"""Act when somebody imports a module, without importing it ourselves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Callback = Callable[[ModuleType], None]


def when_imported(name: str, callback: Callback) -> None:
    """Call ``callback`` with the module ``name`` right after its import, or now if that has happened.

    Looking for the module (``importlib.util.find_spec``) is no import, and an import that fails is none either.
    Callbacks run once, in the order in which they were given, before the importing statement goes on.
    """
    if name in sys.modules:
        callback(sys.modules[name])
        return
    finders = [finder for finder in sys.meta_path if isinstance(finder, _Finder)]
    if not finders:
        finders = [_Finder()]
        sys.meta_path.insert(0, finders[0])
    finders[0].callbacks.setdefault(name, []).append(callback)


class _Finder(MetaPathFinder):
    """Finds what the other finders find, and has the loader tell when it is done."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callback]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.callbacks:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)  # finders of before Python 3.4 have none
            spec: ModuleSpec | None = None if finder is self or find is None else find(fullname, path, target)
            if spec is not None:
                self._watch(spec)
                return spec
        return None

    def _watch(self, spec: ModuleSpec) -> None:
        """Each spec has a loader of its own; the class of the loader, which others look at, stays."""
        loader = spec.loader
        if loader is None:  # a namespace package has nothing to execute
            return
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module
            execute(module)
            for callback in self.callbacks.pop(spec.name, ()):
                callback(module)

        loader.exec_module = exec_module  # type: ignore[method-assign]
