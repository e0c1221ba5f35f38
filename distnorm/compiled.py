"""The C in csrc/, compiled once per machine for its CPU; None where that cannot be done.

The library is kept in the user's cache folder, under a name that tells its sources, flags and processor apart.
``DISTNORM_KERNELS=aten`` does without it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger("distnorm")

SOURCES = tuple(
    Path(__file__).with_name("csrc") / f"{name}.c" for name in ("loops", "arithmetic", "dense", "exchange", "entries")
)
HEADER = SOURCES[0].with_name("kernels.h")
# Only rounding may differ from the C as written: sums are reassociated by hand, infinities and NaN keep their meaning.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
COMPILE_SECONDS = 60

_POINTER, _INDEX, _TURN, _DOUBLE = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int64, ctypes.c_double
_INT = ctypes.c_int
_THREE = [_POINTER] * 3
_IMAGE = [_INDEX, _INDEX, _INDEX, _INT]  # N, C, L, threads
_RATE = [_DOUBLE, _INT]  # momentum, guarded
_LOOPS: dict[str, list[Any]] = {
    "sums": [_POINTER] * 8 + _IMAGE,
    "apply": [_POINTER] * 6 + [_INT, *_IMAGE],
    "combine": [_POINTER] * 8 + _IMAGE,
}
_DENSE: dict[str, list[Any]] = {
    "sums": [_INT, _POINTER, _POINTER, *_IMAGE],
    "normalize": [_INT, _INT, *_THREE, _INT, *_THREE, _POINTER, _DOUBLE, _DOUBLE, *_THREE, _POINTER, *_RATE, *_IMAGE],
    "pull": [_INT, _INT, _INT, *_THREE, *_THREE, *_THREE, *_IMAGE],
    "combine": [_INT, _INT, _INT, *_THREE, _POINTER, _POINTER, _DOUBLE, _POINTER, *_IMAGE],
}
_ABSORB: dict[str, list[Any]] = {"absorb": [_POINTER, _INDEX, *_RATE, *_THREE]}
_EXCHANGE: dict[str, list[Any]] = {
    "post": [_POINTER, _INDEX, _INDEX, _INDEX, _TURN, _TURN, _POINTER, _INDEX],
    "await": [_POINTER, _INDEX, _TURN, _DOUBLE, _DOUBLE],
    "add": [_POINTER, _INDEX, _INDEX, _TURN, _TURN, _POINTER, _INDEX],
}
_ENTRIES: dict[str, list[Any]] = {
    "window": [_POINTER, _INDEX, _DOUBLE, _DOUBLE, _DOUBLE] + [_POINTER] * 5,
    "mix": [_POINTER, _INDEX, _DOUBLE, _DOUBLE, _DOUBLE] + [_POINTER] * 4,
    "push": [_POINTER, _POINTER, _INDEX, _INDEX] + [_POINTER] * 6,
}
_FAMILIES: dict[str, dict[str, list[Any]]] = {"plane": _LOOPS, "row": _LOOPS, "exchange": _EXCHANGE}
_FAMILIES |= {"dense": _DENSE, "entries": _ENTRIES, "rms": _ABSORB, "batch_norm": _ABSORB}
_RANK_RETURNED = ("exchange_await", "exchange_add")


@cache
def library() -> ctypes.CDLL | None:
    """The library; made when first asked for, which takes about a second where the cache has none."""
    choice = os.environ.get("DISTNORM_KERNELS", "compiled")
    if choice not in ("compiled", "aten"):
        raise ValueError(f'environment DISTNORM_KERNELS={choice!r}: allowed are "compiled" (the default) and "aten".')
    if choice == "aten":
        return None
    try:
        return _declare(_load())
    except (OSError, subprocess.SubprocessError) as error:
        told = getattr(error, "stderr", None) or error
        logger.info("distnorm: kernels for this CPU could not be compiled; ATen's serve, slower. Cause: %s", told)
        return None


def _load() -> ctypes.CDLL:
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise FileNotFoundError("no C compiler (cc, gcc, clang, or the one that CC names)")
    kept = _cache_folder() / f"kernels-{_digest(compiler)}.so"
    if kept.exists():
        return ctypes.CDLL(str(kept))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            # In one move: other ranks are doing the same.
            return ctypes.CDLL(str(_compile(compiler, Path(folder) / kept.name).replace(kept)))
    except PermissionError:  # a home that cannot be written to
        with tempfile.TemporaryDirectory() as folder:
            return ctypes.CDLL(str(_compile(compiler, Path(folder) / kept.name)))


def _compile(compiler: str, target: Path) -> Path:
    command = [compiler, *FLAGS, "-o", str(target), *map(str, SOURCES), "-lm"]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_SECONDS)
    return target


def _digest(compiler: str) -> str:
    digest = hashlib.sha256(repr((compiler, FLAGS, _processor())).encode())
    for source in (HEADER, *SOURCES):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What ``-march=native`` depends on: a home folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.platform() + platform.processor()
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distnorm"


def _declare(found: ctypes.CDLL) -> ctypes.CDLL:
    for family, signatures in _FAMILIES.items():
        for part, arguments in signatures.items():
            function = getattr(found, f"{family}_{part}")
            function.argtypes = arguments
            function.restype = _INDEX if f"{family}_{part}" in _RANK_RETURNED else None
    return found
