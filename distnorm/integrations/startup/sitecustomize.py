"""Prepare a Python process that a script under ``distnorm.run`` has started, when it starts.

Python imports the first ``sitecustomize`` on its path, and the run module puts this folder first. Nothing but a hook is
installed here: a process that never imports torch never imports distnorm.
"""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from os import path
from types import ModuleType

_HERE = path.dirname(path.abspath(__file__))


def _load(name: str, file: str) -> ModuleType:
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _after_torch(_: ModuleType) -> None:
    """Import distnorm, unless it is what imports torch."""
    if "distnorm" in sys.modules:
        return
    try:
        import distnorm  # noqa: F401
    except ImportError as error:  # another environment than the script's
        print(f"distnorm.run: models of this process are not converted: {error}", file=sys.stderr)


def _after_distnorm(_: ModuleType) -> None:
    from distnorm.integrations.children import join_job

    join_job()


def _is_run_module() -> bool:
    return ("-m", "distnorm.run") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)


def _hand_on() -> None:
    """Leave the path, and run the module that Python would have found without this one."""
    sys.path[:] = [each for each in sys.path if each != _HERE]
    spec = PathFinder.find_spec("sitecustomize")
    if spec is not None and spec.origin is not None:
        _load("sitecustomize", spec.origin)


if not _is_run_module():  # which converts by itself
    # From its file, since the package imports torch.
    hook = _load("_distnorm_import_hook", path.join(path.dirname(_HERE), "import_hook.py"))
    hook.when_imported("torch", _after_torch)
    hook.when_imported("distnorm", _after_distnorm)
_hand_on()
