"""The C code in csrc/, compiled once per machine for its CPU; None if that is not possible.

``library_cache`` keeps the library; ``DISTNORM_KERNELS=aten`` disables it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from distnorm.kernels import library_cache

logger = logging.getLogger("distnorm")

SOURCES = tuple(
    Path(__file__).with_name("csrc") / f"{name}.c"
    for name in ("loops", "arithmetic", "dense", "exchange", "entries", "key")
)
HEADERS = tuple(SOURCES[0].with_name(f"{name}.h") for name in ("kernels", "activations", "exponential"))
# Rounding alone may differ from the source: sums are reassociated by hand. Infinities and NaN keep their meaning.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")

_POINTER, _INDEX, _TURN, _DOUBLE = ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int64, ctypes.c_double
_INT, _FLOAT = ctypes.c_int, ctypes.c_float


class _Epilogue(ctypes.Structure):
    _fields_ = (("activation", _INT), ("parameter", _FLOAT))


NO_EPILOGUE = _Epilogue()
_THREE = [_POINTER] * 3
_IMAGE = [_INDEX, _INDEX, _INDEX, _INT]  # N, C, L, threads
_RATE = [_DOUBLE, _INT]  # momentum, guarded
_LOOPS: dict[str, list[Any]] = {
    "sums": [*[_POINTER] * 7, _Epilogue, _POINTER, *_IMAGE],
    "apply": [*[_POINTER] * 6, _Epilogue, *_IMAGE],
    "combine": [*[_POINTER] * 8, *_IMAGE],
}
_DENSE: dict[str, list[Any]] = {
    "sums": [_POINTER, _INT, _INT, _DOUBLE, _POINTER, *_IMAGE],
    "normalize": [_POINTER, *_THREE, _INT, _FLOAT, *_THREE, _POINTER, _DOUBLE, *_THREE, *_RATE],
    "pull": [*_THREE, *_THREE, *_THREE],
    "combine": [*_THREE, _POINTER, _POINTER],
}
_UPDATE_RUNNING: dict[str, list[Any]] = {"update_running": [_POINTER, _DOUBLE, _DOUBLE, _INDEX, *_RATE, *_THREE]}
_EXCHANGE: dict[str, list[Any]] = {
    "post": [_POINTER, _INDEX, _INDEX, _INDEX, _TURN, _TURN, _POINTER, _INDEX],
    "await": [_POINTER, _INDEX, _TURN, _DOUBLE, _DOUBLE],
    "add": [_POINTER, _INDEX, _INDEX, _TURN, _TURN, _POINTER, _INDEX],
}
_ENTRIES: dict[str, list[Any]] = {
    "window": [_POINTER, _INDEX, _INT, _DOUBLE, _DOUBLE] + [_POINTER] * 5,
    "mix": [_POINTER, _INDEX, _DOUBLE, _DOUBLE, _DOUBLE] + [_POINTER] * 4,
    "push": [_POINTER, _POINTER, _INDEX, _INDEX] + [_POINTER] * 6,
}
_FAMILIES: dict[str, dict[str, list[Any]]] = {"plane": _LOOPS, "row": _LOOPS, "exchange": _EXCHANGE}
_FAMILIES |= {"dense": _DENSE, "entries": _ENTRIES, "rms": _UPDATE_RUNNING, "batch_norm": _UPDATE_RUNNING}
_RANK_RETURNED = ("exchange_await", "exchange_add")


def wanted() -> bool:
    """Return whether the environment allows compiled kernels, in C or Triton.

    Raises:
        ValueError: DISTNORM_KERNELS has another value than "compiled" and "aten".
    """
    choice = os.environ.get("DISTNORM_KERNELS", "compiled")
    if choice not in ("compiled", "aten"):
        raise ValueError(f'environment DISTNORM_KERNELS={choice!r}: allowed are "compiled" (the default) and "aten".')
    return choice == "compiled"


@cache
def library() -> ctypes.CDLL | None:
    """Return the library; compiled on first use, which takes about a second if the cache does not have it."""
    if not wanted():
        return None
    try:
        return library_cache.load(SOURCES, HEADERS, FLAGS, _declare)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning(
            "distnorm: kernels for this CPU could not be compiled; using ATen's, which are slower. Cause: %s",
            library_cache.cause(error),
        )
        return None


def _declare(found: ctypes.CDLL) -> None:
    for family, signatures in _FAMILIES.items():
        for part, arguments in signatures.items():
            function = getattr(found, f"{family}_{part}")
            function.argtypes = arguments
            function.restype = _INDEX if f"{family}_{part}" in _RANK_RETURNED else None
