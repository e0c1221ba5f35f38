"""Convert models also in processes that the script starts, as in the process that ``distnorm.run`` started.

Lightning starts ranks by running the script again, without the run module. The only user of its private
``_basic_subprocess_cmd`` and ``_hydra_subprocess_cmd`` (2.6; tests/integrations/test_children.py fails when they
change). ``torch.multiprocessing.spawn`` and ``start_processes`` start a function; Accelerate's ``notebook_launcher``
uses them.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.multiprocessing

from distnorm.integrations.import_hook import when_imported
from distnorm.integrations.job import Job
from distnorm.integrations.wrapping import install
from distnorm.settings import Settings

_LAUNCHERS = (
    "lightning.fabric.strategies.launchers.subprocess_script",
    "lightning_fabric.strategies.launchers.subprocess_script",
)
_installed = False  # in this process, or in the parent that forked it


def convert_in_children(job: Job, settings: Settings | None, flags: Sequence[str]) -> None:
    """Let processes that this one starts convert models as ``job`` does, from now on. Issues no collective.

    Args:
        job: the job that ``install`` returned.
        settings: the settings that ``install`` was given.
        flags: command-line options of the run module; children inherit other settings from the environment.
    """
    global _installed
    _installed = True
    for launcher in _LAUNCHERS:
        when_imported(launcher, functools.partial(_run_again_with, flags=tuple(flags)))
    _wrap_start_processes(job, settings, tuple(flags))


def _run_again_with(launcher: Any, flags: Sequence[str]) -> None:
    """Insert the run module into the commands with which ``launcher``, a module of Lightning, starts other ranks."""
    basic, hydra = launcher._basic_subprocess_cmd, launcher._hydra_subprocess_cmd

    @functools.wraps(basic)
    def basic_subprocess_cmd() -> Sequence[str]:
        return _with_run_module(basic(), flags)

    @functools.wraps(hydra)
    def hydra_subprocess_cmd(local_rank: int) -> tuple[Sequence[str], str]:
        command, folder = hydra(local_rank)
        return _with_run_module(command, flags), folder

    launcher._basic_subprocess_cmd, launcher._hydra_subprocess_cmd = basic_subprocess_cmd, hydra_subprocess_cmd


def _with_run_module(command: Sequence[str], flags: Sequence[str]) -> list[str]:
    python, *rest = command
    return [python, "-m", "distnorm.run", *flags, *rest]


def _wrap_start_processes(job: Job, settings: Settings | None, flags: tuple[str, ...]) -> None:
    module: Any = importlib.import_module("torch.multiprocessing.spawn")  # the attribute is the function of that name
    original = module.start_processes

    @functools.wraps(original)
    def start_processes(fn: Callable[..., object], *args: Any, **options: Any) -> Any:
        job.is_one_of_several = True
        return original(Converting(fn, settings, flags), *args, **options)

    module.start_processes = start_processes  # spawn calls it
    torch.multiprocessing.start_processes = start_processes


@dataclass(frozen=True)
class Converting:
    """Calls ``function`` in a new process, after it has set up conversion as the run module does.

    Args:
        function: takes the number of the process first; can be pickled, as ``torch.multiprocessing.spawn`` requires.
        settings: as ``convert_in_children``.
        flags: as ``convert_in_children``.
    """

    function: Callable[..., object]
    settings: Settings | None
    flags: tuple[str, ...]

    def __call__(self, number: int, *args: Any) -> None:
        """Call the function.

        Raises:
            BaseException: any exception of the function.
        """
        if _installed:  # a forked process has the hooks of its parent
            self.function(number, *args)
            return
        job = install(self.settings)
        convert_in_children(job, self.settings, self.flags)
        job.is_one_of_several = number > 0
        try:
            self.function(number, *args)
        except BaseException:
            job.failed = True
            raise
