"""Convert models also in processes that the script starts, as in the process that ``distnorm.run`` started.

Python processes find ``startup/sitecustomize.py`` through the environment, whatever starts them: ``subprocess``, a
shell, ``torch.multiprocessing``, the launchers of Lightning and Accelerate. Forked processes have the hooks already.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.multiprocessing

from distnorm.integrations.job import Job
from distnorm.integrations.patching import before_init
from distnorm.integrations.wrapping import install
from distnorm.settings import FLAGS_VARIABLE, from_environment, inherited_flags, merge

_STARTUP = Path(__file__).with_name("startup")
_STARTS_PYTHON = re.compile(r"python|torchrun|accelerate|deepspeed|mpirun|mpiexec|srun")


# docs/decisions.md#children-are-reached-through-the-environment
def convert_in_children(job: Job, flags: Mapping[str, object]) -> None:
    """Let processes that this one starts convert models as ``job`` does, from now on. Issues no collective.

    Args:
        job: the job that ``install`` returned.
        flags: settings from the command line of the run module; children inherit the others from the environment.
    """
    given = merge(inherited_flags(os.environ), {key: value for key, value in flags.items() if value is not None})
    if given:
        os.environ[FLAGS_VARIABLE] = json.dumps(given)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{_STARTUP}{os.pathsep}{path}" if path else str(_STARTUP)
    _note_started_processes(job)


def join_job() -> None:
    """Convert the models of this process, which a script under the run module has started."""
    job = install(from_environment(os.environ))
    job.is_one_of_several = True


def _note_started_processes(job: Job) -> None:
    """Let ``job`` know when this process starts others that may wrap models."""

    def note(command: Any) -> None:
        words = [command] if isinstance(command, str | bytes | os.PathLike) else command
        job.is_one_of_several |= any(_STARTS_PYTHON.search(os.fsdecode(word)) for word in words)

    def noting(function: Callable[..., Any], *, always: bool = False) -> Callable[..., Any]:
        @functools.wraps(function)
        def started(first: Any, *args: Any, **options: Any) -> Any:
            note("python" if always else first)
            return function(first, *args, **options)

        return started

    before_init(subprocess.Popen, "args", note)
    os.system = noting(os.system)
    module: Any = importlib.import_module("torch.multiprocessing.spawn")  # the attribute is the function of that name
    module.start_processes = noting(module.start_processes, always=True)  # spawn calls it
    torch.multiprocessing.start_processes = module.start_processes
