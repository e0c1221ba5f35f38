"""Run a script or a module as ``python script.py`` and ``python -m module`` do, in this process.

``runpy.run_path`` is not used, since it removes ``__main__`` when the script ends, when atexit handlers, threads and
pickles may still need it. The only user of ``runpy._run_module_as_main`` (Python 3.11 to 3.13; the interpreter itself
calls it for ``-m``), pinned by tests/integrations/test_script.py.
"""

from __future__ import annotations

import builtins
import io
import os
import pkgutil
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import SourceFileLoader
from types import ModuleType, TracebackType


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run the file ``path``, or the ``__main__.py`` of a folder or archive, as the main program.

    Raises:
        OSError: the file cannot be read; nothing has run.
        BaseException: any exception of the script. If nothing catches it, the printed traceback starts in the script.
    """
    if pkgutil.get_importer(path) is not None:
        sys.argv = [path, *arguments]
        if sys.flags.safe_path:
            sys.path.insert(0, os.path.abspath(path))
        else:
            sys.path[0] = os.path.abspath(path)
        _run_module("__main__", alter_argv=False)
        return
    file = os.path.abspath(path)
    with io.open_code(file) as source:
        text = source.read()
    sys.argv = [path, *arguments]
    if not sys.flags.safe_path:
        # "python -m" has put the current folder here, but "python script.py" puts the script's folder.
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    main = _new_main()
    main.__file__ = file
    main.__loader__ = SourceFileLoader("__main__", file)
    main.__dict__["__cached__"] = None
    with _script_traceback():
        exec(compile(text, file, "exec", dont_inherit=True), main.__dict__)


def run_module(name: str, arguments: Sequence[str]) -> None:
    """Run the module or package ``name`` as the main program.

    Raises:
        BaseException: as ``run_script``; SystemExit if there is no such module.
    """
    sys.argv = ["-m", *arguments]
    _run_module(name, alter_argv=True)


def report_to_launcher(error: BaseException) -> None:
    """Tell torchrun where the script failed, unless the script has: its report names the module that it started."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None or os.path.exists(path):
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler  # here: most scripts do not fail

    whole, error.__traceback__ = error.__traceback__, _without_ours(error.__traceback__)
    get_error_handler().record_exception(error)
    error.__traceback__ = whole


def _run_module(name: str, *, alter_argv: bool) -> None:
    _new_main()
    with _script_traceback():
        runpy._run_module_as_main(name, alter_argv)  # type: ignore[attr-defined]


def _new_main() -> ModuleType:
    main = ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    sys.modules["__main__"] = main
    return main


@contextmanager
def _script_traceback() -> Iterator[None]:
    """Let the interpreter handle an exception as usual, but pass only the script's frames to the excepthook."""
    try:
        yield
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook = partial(_show, sys.excepthook)
        raise


def _show(
    hook: Callable[[type[BaseException], BaseException, TracebackType | None], object],
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """Call the previous excepthook, which may be the script's, without our frames."""
    sys.excepthook = hook
    inner = sys.last_traceback = error.__traceback__ = _without_ours(trace)
    hook(kind, error, inner)


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    """Return the traceback after the last frame of this file. Frames of runpy stay, as with "python -m"."""
    inner = frame = trace
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == __file__:
            inner = frame.tb_next
        frame = frame.tb_next
    return inner
