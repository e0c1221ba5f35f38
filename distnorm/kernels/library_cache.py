"""A library that is compiled from C on first use, and kept in the user's cache folder for later processes.

Its name is ``kernels-<key>-<digest>.so``. The key covers everything that libraries depend on: sources, flags, compiler
and its version, machine, processor and libc. The digest is that of the file, so a truncated, foreign or empty file is
detected before it is loaded, and is compiled again. Files are moved to that name complete, never written under it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger("distnorm")

COMPILE_SECONDS = 60
FORGOTTEN_SECONDS = 24 * 3600
"""Age, in seconds, of a folder that another machine, or this one before a reboot, has left behind."""
_BUILD = "distnorm-build"

Check = Callable[[ctypes.CDLL], None]
"""Declare what a library must have. Raise AttributeError if something is missing."""


# docs/decisions.md#c-code-is-compiled-on-first-use
def load(sources: Sequence[Path], headers: Sequence[Path], flags: Sequence[str], check: Check) -> ctypes.CDLL:
    """Return the library of ``sources``, cached or compiled; if it cannot be cached, warn and use a temporary folder.

    Raises:
        OSError: there is no compiler, or the compiled file cannot be loaded.
        subprocess.SubprocessError: the compiler fails, or needs longer than ``COMPILE_SECONDS``.
    """
    compiler = _compiler(os.environ)
    key = _key(compiler, flags, [*headers, *sources])
    command = [*compiler, *flags, f"-DDISTNORM_KEY={key}", *map(str, sources), "-lm"]
    try:
        folder = _cache_folder(os.environ)
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        return _kept(folder, key, check) or _made(command, folder, key, check)
    except (OSError, subprocess.CalledProcessError) as error:
        # A full disk appears as an error of the compiler, so any failure leads to the temporary folder.
        folder = Path(tempfile.gettempdir())
        _sweep(folder)
        library = _made(command, folder, key, check, keep=False)
        logger.warning(
            "distnorm: the kernels for this CPU cannot be cached, so every process compiles its own. Set "
            "XDG_CACHE_HOME to a folder that can be written to. Cause: %s",
            cause(error),
        )
        return library


def cause(error: BaseException) -> str:
    """Return the message of a failed compilation, or of a folder that cannot be used."""
    return f"{error}\n{told}" if (told := getattr(error, "output", None)) else str(error)


# --- the cache -----------------------------------------------------------------------------------


def _cache_folder(environment: Mapping[str, str]) -> Path:
    named = Path(environment.get("XDG_CACHE_HOME") or "")
    if named.is_absolute():  # the XDG specification ignores relative paths
        return named / "distnorm"
    try:
        return Path.home() / ".cache" / "distnorm"
    except RuntimeError as error:
        raise OSError(f"HOME and XDG_CACHE_HOME are not set. {error}") from error


def _kept(folder: Path, key: str, check: Check) -> ctypes.CDLL | None:
    """Return the library of ``key`` in ``folder``, if there is an intact one."""
    for file in folder.glob(f"kernels-{key}-*.so"):
        try:
            if file.name == _name(key, file.read_bytes()):
                return _opened(file, key, check)
        except OSError as error:
            logger.info("distnorm: compiling %s again: %s", file, error)
    return None


def _name(key: str, content: bytes) -> str:
    return f"kernels-{key}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def _opened(file: Path, key: str, check: Check) -> ctypes.CDLL:
    """Load ``file``, whose content is known to be complete, and check its key."""
    library = ctypes.CDLL(str(file))
    try:
        library.distnorm_key.restype = ctypes.c_char_p
        check(library)
    except AttributeError as error:
        raise OSError(f"{file} is not distnorm's library: {error}") from error
    if (found := library.distnorm_key()) != key.encode():
        raise OSError(f"{file} was compiled for {found!r}.")
    return library


# --- compiling ------------------------------------------------------------------------------------


def _made(command: list[str], folder: Path, key: str, check: Check, *, keep: bool = True) -> ctypes.CDLL:
    """Compile in ``folder``, and keep the library there, in place of all others of this key."""
    with _build_folder(folder) as workshop:
        made = workshop / "kernels.so"
        _run([*command, "-o", str(made)], TMPDIR=str(workshop))
        library = _opened(made, key, check)
        if keep:
            kept = folder / _name(key, made.read_bytes())
            made.replace(kept)  # atomically, since other ranks do the same
            for other in folder.glob(f"kernels-{key}-*.so"):
                if other != kept:
                    other.unlink(missing_ok=True)
    return library


@contextmanager
def _build_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder in ``folder``, whose name contains the process that uses it."""
    with tempfile.TemporaryDirectory(prefix=f"{_BUILD}-{_machine()}-{os.getpid()}-", dir=folder) as workshop:
        yield Path(workshop)


def _sweep(folder: Path) -> None:
    """Remove the temporary folders in ``folder`` of processes that were killed."""
    for left in folder.glob(f"{_BUILD}-*-*-*"):
        machine, process = left.name.removeprefix(f"{_BUILD}-").split("-")[:2]
        try:
            dead = not _is_running(int(process)) if machine == _machine() else _is_forgotten(left)
        except (OSError, ValueError, OverflowError):  # another process was faster, or the folder is not ours
            continue
        if dead:
            shutil.rmtree(left, ignore_errors=True)  # other processes remove it, too


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_forgotten(folder: Path) -> bool:
    return time.time() - folder.stat().st_mtime > FORGOTTEN_SECONDS


def _machine() -> str:
    """Return an identifier of where process numbers are valid: one boot, one namespace."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
    except OSError:
        text = platform.node()
    return hashlib.sha256(text.encode()).hexdigest()[:8]


# --- the compiler --------------------------------------------------------------------------------


def _compiler(environment: Mapping[str, str]) -> list[str]:
    """Return the words of CC, split as a shell does; if it is not set, the first compiler found."""
    given = environment.get("CC", "")
    try:
        words = shlex.split(given)
    except ValueError as error:
        raise OSError(f"CC={given!r} is not a command: {error}") from error
    if not words:
        words = [name for name in ("cc", "gcc", "clang") if shutil.which(name)][:1]
    if not words:
        raise FileNotFoundError("no C compiler (cc, gcc, clang, or the one that CC names)")
    return words


def _key(compiler: list[str], flags: Sequence[str], files: Sequence[Path]) -> str:
    version = _run([*compiler, "--version"])
    parts = (compiler, version, flags, platform.machine(), _processor(), platform.libc_ver())
    digest = hashlib.sha256(repr(parts).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Return what ``-march=native`` depends on, since different machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _run(command: list[str], **environment: str) -> str:
    """Return the output of ``command``. On a timeout or an interrupt, kill all processes that it has started."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **environment},
        start_new_session=True,
    ) as process:
        try:
            told, _ = process.communicate(timeout=COMPILE_SECONDS)
        except BaseException:
            with suppress(ProcessLookupError):  # it has ended already
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, told)
    return told
