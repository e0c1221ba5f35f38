"""Run callbacks when a module is imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

Callback = Callable[[ModuleType], None]


def when_imported(name: str, callback: Callback) -> None:
    """Call ``callback`` with the module ``name`` right after its import, or now if it is imported already.

    Neither a search for the module (``importlib.util.find_spec``) nor a failed import calls it. Callbacks run once, in
    the order in which they were given, before the import statement returns.
    """
    if name in sys.modules:
        callback(sys.modules[name])
        return
    finders = [finder for finder in sys.meta_path if isinstance(finder, _Finder)]
    if not finders:
        finders = [_Finder()]
        sys.meta_path.insert(0, finders[0])
    finders[0].callbacks.setdefault(name, []).append(callback)


class _Finder:
    """Delegates to the other finders, and patches the loader to run callbacks after the import."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callback]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.callbacks:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)  # finders written for Python < 3.4 have none
            spec: ModuleSpec | None = None if finder is self or find is None else find(fullname, path, target)
            if spec is not None:
                self._watch(spec)
                return spec
        return None

    def _watch(self, spec: ModuleSpec) -> None:
        """Patch the instance: each spec has a separate loader, and other code checks the loader's class."""
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
