"""What is wrong with the cache of compiled kernels, or with the compiler, when the ranks of a job come."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from distnorm.kernels import library_cache, native


def truncated_kernel(cache: Path) -> None:
    for file in _kernels(cache):
        os.truncate(file, file.stat().st_size // 2)


def empty_kernel(cache: Path) -> None:
    for file in _kernels(cache):
        os.truncate(file, 0)


def garbage_kernel(cache: Path) -> None:
    for file in _kernels(cache):
        file.write_bytes(os.urandom(5000))


def foreign_kernel(cache: Path) -> None:
    """Somebody else's library, whole, under a name that says so."""
    source = cache / "foreign.c"
    source.write_text("int foreign(void) { return 1; }")
    for file in _kernels(cache):
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(file), str(source)], check=True)
        file.rename(file.with_name(library_cache._name(file.name.split("-")[1], file.read_bytes())))


def no_home(_: Path) -> None:
    def nobody(number: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    pwd.getpwuid = nobody


def no_writing(_: Path) -> None:
    """Root may write anywhere but there."""
    os.environ["XDG_CACHE_HOME"] = "/proc/self"


def words_in_cc(_: Path) -> None:
    os.environ["CC"] = "gcc -m64"


def killed_compile(cache: Path) -> None:
    """The first one of each rank."""
    compiler = cache / f"compiler-{os.getpid()}"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { mkdir "$0.was" && kill -9 $$; }\nexec cc "$@"\n')
    compiler.chmod(0o755)
    os.environ["CC"] = str(compiler)


OF_FILES: dict[str, Callable[[Path], None]] = {
    each.__name__: each for each in (truncated_kernel, empty_kernel, garbage_kernel, foreign_kernel)
}
OF_RANKS: dict[str, Callable[[Path], None]] = {
    each.__name__: each for each in (no_home, no_writing, words_in_cc, killed_compile)
}


def prepare(do: str, cache: Path, number: int) -> None:
    """As rank 0, fill a ``cache`` for both, and harm it if that is what to ``do``."""
    if number == 0:
        shutil.copytree(library_cache._cache_folder(os.environ), cache / "distnorm")
        if do in OF_FILES:
            OF_FILES[do](cache)


def use(do: str, cache: Path) -> None:
    """Look for kernels in a prepared ``cache``, or where ``do`` says, and not among those that are loaded."""
    os.environ["XDG_CACHE_HOME"] = str(cache)
    if do in OF_RANKS:
        OF_RANKS[do](cache)
    native.library.cache_clear()


def _kernels(cache: Path) -> Iterator[Path]:
    yield from list((cache / "distnorm").glob("*.so"))
