"""A script behaves as under ``python script.py``: every case runs both ways, and everything that shows is compared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
ARGUMENTS = ["--recipe", "x", "-m", "--", "--ledger", "-h"]

CASES = {
    "arguments and globals": """
        import sys
        print(sys.argv, sys.path[:1], __name__, __file__, __package__, __spec__, __doc__, __builtins__, __cached__)
        print(sorted(globals()), type(__loader__), __loader__.name, __loader__.path, __annotations__)
        """,
    "exit with a number": "import sys; print('out'); sys.exit(7)",
    "exit with a text": "import sys; sys.exit('no data')",
    "exit with nothing": "import sys; print('out'); sys.exit()",
    "exit without Python's consent": "import os; os._exit(5)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "uncaught": """
        def inner(): return {}["key"]
        def outer(): inner()
        outer()
        """,
    "uncaught, with a cause": """
        try:
            try: 1 / 0
            except ZeroDivisionError as error: raise ValueError("outer") from error
        except ValueError:
            raise KeyError("last")
        """,
    "group of errors": "raise ExceptionGroup('several', [ValueError(1), TypeError(2)])",
    "interrupted": "raise KeyboardInterrupt",
    "interrupted, then atexit": "import atexit; atexit.register(print, 'end'); raise KeyboardInterrupt",
    "syntax error": "x = (1,\\nprint(",
    "excepthook of its own": """
        import sys, traceback
        def hook(kind, error, trace):
            names = [frame.name for frame in traceback.extract_tb(trace)]
            print(kind.__name__, error, names, error.__traceback__ is trace)
        sys.excepthook = hook
        def f(): raise RuntimeError("seen")
        f()
        """,
    "last error": """
        import atexit, sys, traceback
        atexit.register(lambda: print(sys.last_type, sys.last_value, len(traceback.extract_tb(sys.last_traceback))))
        1 / 0
        """,
    "globals at exit": """
        import atexit
        class Kept: pass
        @atexit.register
        def end():
            import __main__, sys
            print(Kept, __main__ is sys.modules["__main__"], __main__.Kept is Kept, Kept.__module__)
        """,
    "a thread outlives the script": """
        import threading, time, pickle
        class Point: pass
        def late():
            threading.main_thread().join()
            print(type(pickle.loads(pickle.dumps(Point()))) is Point)
        threading.Thread(target=late).start()
        """,
    "an error in a thread": """
        import threading
        thread = threading.Thread(target=lambda: 1 / 0, name="worker")
        thread.start(); thread.join()
        """,
    "a function and a class by pickle": """
        import pickle
        class Point: pass
        def f(): pass
        print(pickle.dumps((Point, f)), pickle.loads(pickle.dumps(Point())).__class__ is Point)
        """,
    "processes that fork": """
        import multiprocessing
        def square(x): return x * x
        if __name__ == "__main__":
            with multiprocessing.get_context("fork").Pool(1) as pool: print(pool.map(square, range(4)))
        """,
    "processes that spawn": """
        import multiprocessing, sys
        class Point:
            def __init__(self, x): self.x = x
        def square(point): return Point(point.x ** 2), __name__, __file__, sys.argv
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                for point, *rest in pool.map(square, [Point(2), Point(3)]): print(type(point) is Point, point.x, rest)
        """,
    "spawn without a guard": """
        import multiprocessing
        print("imported as", __name__)
        def f(): print("child")
        if __name__ == "__main__":
            p = multiprocessing.get_context("spawn").Process(target=f); p.start(); p.join()
        """,
    "a file beside it": "import beside; print(beside.main_file(), beside.__name__)",
    "future imports are its own": "def f(x: int): pass\\nprint(f.__annotations__)",
    "dataclass and type hints": """
        import dataclasses, typing
        @dataclasses.dataclass
        class Options: rate: "float" = 0.1
        print(typing.get_type_hints(Options), Options())
        """,
    "its source": """
        import inspect
        def f(): return 1
        print(inspect.getsource(f))
        """,
    "logging at exit": """
        import logging, sys
        logging.basicConfig(stream=sys.stdout, format="%(name)s %(module)s %(lineno)d %(message)s")
        logging.getLogger(__name__).warning("text")
        import warnings; warnings.warn("careful")
        """,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    files = {
        "src/beside.py": "import __main__\ndef main_file(): return __main__.__file__\n",
        "package/__init__.py": "print('package is imported')\n",
        "package/__main__.py": "from . import part\nprint(__name__, __package__, __spec__.name, part.VALUE)\n",
        "package/part.py": "VALUE = 3\n",
        "package/train.py": "import sys\nfrom . import part\nfrom .part import VALUE\n"
        "print(sys.argv, sys.path[0], __name__, __package__, __spec__.name, __file__, VALUE)\n",
        "package/fails.py": "from .part import VALUE\nraise ValueError(VALUE)\n",
        "folder/__main__.py": "import sys, helper\n"
        "print(sys.argv, sys.path[0], __name__, __package__, helper.X)\n1 / 0\n",
        "folder/helper.py": "X = 1\n",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def _run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *arguments]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return ended.returncode, ended.stdout, ended.stderr


def _assert_alike(folder: Path, *target: str) -> tuple[int, str, str]:
    plain = _run(folder, *target, *ARGUMENTS)
    assert _run(folder, "-m", "run_bare", *target, *ARGUMENTS) == plain
    return plain


@pytest.mark.parametrize("case", CASES)
def test_a_script_shows_what_it_shows_alone(case: str, folder: Path) -> None:
    lines = CASES[case].replace("\\n", "\n").splitlines()
    (folder / "src" / "case.py").write_text("\n".join(line.removeprefix(" " * 8) for line in lines) + "\n")
    code, out, err = _assert_alike(folder, "src/case.py")
    assert code or out or err, "a case that shows nothing tests nothing"


@pytest.mark.parametrize("module", ["package.train", "package", "package.fails", "package.missing", "missing"])
def test_a_module_shows_what_it_shows_alone(module: str, folder: Path) -> None:
    _assert_alike(folder, "-m", module)


def test_a_folder_shows_what_it_shows_alone(folder: Path) -> None:
    code, out, _ = _assert_alike(folder, "folder")
    assert code == 1 and "'folder'" in out


def test_a_link_finds_the_files_beside_its_target(folder: Path) -> None:
    (folder / "src" / "linked.py").write_text("import beside, sys\nprint(beside.main_file(), sys.path[0])\n")
    (folder / "link.py").symlink_to(folder / "src" / "linked.py")
    code, *_ = _assert_alike(folder, "link.py")
    assert code == 0


def test_bytes_in_another_encoding_are_read_as_declared(folder: Path) -> None:
    (folder / "src" / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nprint(ascii('é'))\n".encode("latin-1"))
    assert _assert_alike(folder, "src/latin.py")[1] == "'\\xe9'\n"
