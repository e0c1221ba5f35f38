"""What users are told of a job: on its first rank only, at their own line."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import torch.distributed as dist

logger = logging.getLogger("distnorm")

_RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")
_PACKAGE = str(Path(__file__).parent) + os.sep


def is_first_rank() -> bool:
    """Return whether this process is the first of its job, by torch.distributed or by the launcher's variables."""
    return (dist.get_rank() if dist.is_initialized() else rank_of(os.environ)) == 0


def rank_of(environment: Mapping[str, str]) -> int:
    """Return the rank that a launcher has put into ``environment``; 0 if none has."""
    return next((int(environment[name]) for name in _RANK_VARIABLES if name in environment), 0)


def warn(text: str) -> None:
    """Warn on the first rank, at the line that called distnorm."""
    if is_first_rank():
        warnings.warn(text, stacklevel=_callers_level())


def _callers_level() -> int:
    """Return the ``stacklevel``, for the caller of this function, of the nearest line outside of distnorm."""
    for level in count(1):
        frame = sys._getframe(level)
        if frame.f_back is None or not frame.f_code.co_filename.startswith(_PACKAGE):
            return level
    raise AssertionError


def say(text: str) -> None:
    """Report ``text`` to the logging of the script if it shows such reports, else to stderr."""
    if logger.isEnabledFor(logging.INFO) and logger.hasHandlers():
        logger.info("%s", text)
    elif "tqdm" in sys.modules:  # around its progress bars
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr, flush=True)
