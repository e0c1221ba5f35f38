"""``distnorm launch``: ``accelerate launch`` with converted models.

The only user of ``accelerate.commands.launch`` (1.15; tests/integrations/test_launch.py fails when it changes). Every
worker runs the script through ``-m distnorm.run``. The settings of the config file are passed in the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distnorm.cli.config_file import SECTION, ConfigFile, default_path
from distnorm.cli.processes import Processes, foresee, nested
from distnorm.settings import SECTION_VARIABLE, Settings, from_environment

_HELP = """\
usage: distnorm launch [options of accelerate launch] script [its arguments]

  distnorm launch --config_file cfg.yaml train.py --lr 0.1

Run `accelerate launch` on a config file that has a section of distnorm. The
models of the script are converted as the section says, just before Accelerate
wraps them. Arguments, output and exit code are those of `accelerate launch`.

`distnorm config --config_file cfg.yaml --recipe mabn` writes the section:

  distnorm_config:
    recipe: mabn
    options: {window: 8}      # see `distnorm recipes mabn`
    where: [backbone.*]       # layers to convert; all if this is left out

Environment variables (DISTNORM_RECIPE and so on) come before the section.
All other options: accelerate launch --help.
"""
_SETTING = "Set num_processes in the config file or pass --num_processes; on CPU also set use_cpu: true or pass --cpu."


def main(arguments: Sequence[str]) -> int:
    """Run the command; return 0, or 2 after an error message.

    ``--help`` alone prints a short help of our own: accelerate's has some 500 lines.

    Exceptions of accelerate, when a worker fails, are not caught, so that the exit code is that of accelerate.
    """
    if list(arguments) in (["-h"], ["--help"]):
        print(_HELP, end="")
        return 0
    try:
        job = plan(parse(arguments), os.environ)
    except (ImportError, ValueError) as error:
        print(f"distnorm launch: error: {error}", file=sys.stderr)
        return 2
    for note in job.notes:
        print(f"distnorm launch: {note}", file=sys.stderr, flush=True)
    start(job)
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse arguments as ``accelerate launch`` does.

    Raises:
        ImportError: accelerate is not installed.
    """
    default_path()  # raises with advice if accelerate is not installed
    from accelerate.commands.launch import launch_command_parser

    with _arguments_of_the_process(arguments):
        parser = launch_command_parser()
        parser.prog = "distnorm launch"
        namespace: argparse.Namespace = parser.parse_args(list(arguments))
    return namespace


@dataclass(frozen=True)
class Job:
    """A job for ``accelerate launch``.

    Args:
        arguments: as accelerate's parser returns them.
        file: the user's config file, if there is one.
        config: the values that accelerate reads instead; None lets accelerate choose its file.
        environment: variables for the workers.
        notes: messages for the user.
    """

    arguments: argparse.Namespace
    file: ConfigFile | None = None
    config: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Job:
    """Prepare a job, without starting it.

    Args:
        arguments: as ``parse`` returns them.
        environment: environment variables of the launcher.

    Raises:
        ImportError: accelerate is not installed.
        ValueError: a value in the config file or in ``DISTNORM_*`` is not allowed, or the job cannot be converted.
    """
    file = _config_file(arguments)
    for_workers = _section_variable(file)
    settings = from_environment({**environment, **for_workers})
    if settings is None:
        return Job(arguments, notes=[_nothing_is_converted(file)])
    # With --cpu and no --config_file, accelerate does not read its default file; its section is still used.
    reads = file is not None and (arguments.config_file is not None or not arguments.cpu)
    config = file.for_accelerate() if file is not None and reads else None
    processes = foresee(arguments, config, environment)
    _refuse(config, processes, arguments)
    notes = []
    if arguments.no_python:
        notes.append(
            f"{arguments.training_script} runs without distnorm.run (--no_python); models are converted only if it "
            "starts `python -m distnorm.run` itself."
        )
    if processes.are_dropped:
        arguments, config, by_torchrun = _on_cpu(arguments, config, processes)
        for_workers |= by_torchrun
        notes.append(
            f"starts {processes.asked} CPU processes with torchrun and ACCELERATE_USE_CPU=true, since accelerate would "
            "start only one."
        )
    elif _shares(settings):
        notes += _warning(settings, processes)
    if not arguments.no_python:
        arguments = _through_run(arguments)
    return Job(arguments, file, config, for_workers, notes)


def start(job: Job) -> None:
    """Let accelerate launch ``job``; return when all workers have ended without an error.

    Raises:
        Exception: any exception of ``accelerate launch``; messages name the user's config file.
    """
    from accelerate.commands.launch import launch_command
    from accelerate.utils import patch_environment

    with patch_environment(**job.environment), tempfile.TemporaryDirectory(prefix="distnorm-") as folder:
        if job.config is None:
            launch_command(job.arguments)
            return
        copy = _write(job, folder)
        try:
            launch_command(_changed(job.arguments, config_file=copy))
        except ValueError as error:
            if job.file is not None:
                error.args = tuple(str(each).replace(copy, job.file.path) for each in error.args)
            raise


def _config_file(arguments: argparse.Namespace) -> ConfigFile | None:
    if arguments.config_file is not None:
        return ConfigFile.read(arguments.config_file)
    return ConfigFile.read(default_path()) if os.path.isfile(default_path()) else None


def _section_variable(file: ConfigFile | None) -> dict[str, str]:
    settings = file.settings() if file is not None else None
    if settings is None:
        return {}
    return {SECTION_VARIABLE: json.dumps({"source": settings.source, "section": settings.section()})}


def _nothing_is_converted(file: ConfigFile | None) -> str:
    if file is None:
        return (
            "no config file and no DISTNORM_* variable: nothing is converted, as under `accelerate launch`. Pass a "
            "file that `distnorm config` has written with --config_file, or set DISTNORM_RECIPE=sync_bn."
        )
    return (
        f"{file.path} has no section {SECTION}: nothing is converted, as under `accelerate launch`. "
        f"`distnorm config --config_file {file.path} --recipe sync_bn` writes one."
    )


def _refuse(config: Mapping[str, Any] | None, processes: Processes, arguments: argparse.Namespace) -> None:
    values = config or {}
    if processes.kind == "XLA" or values.get("compute_environment") == "AMAZON_SAGEMAKER":
        raise ValueError(
            "jobs on TPU and SageMaker cannot run `-m distnorm.run`. Call distnorm.convert(model, ...) in the script "
            "and use `accelerate launch`."
        )
    key = "deepspeed_multinode_launcher"
    launcher = arguments.deepspeed_multinode_launcher or nested(values, "deepspeed_config", key) or "pdsh"
    if processes.kind == "DEEPSPEED" and processes.machines > 1 and launcher != "standard":
        raise ValueError(  # deepspeed 0.19 exports values without quotes, and accelerate 1.15 drops those with spaces
            f"{key} {launcher!r} does not pass distnorm's settings to other machines. Set "
            f"{key}: standard and start `distnorm launch` on every machine."
        )


def _on_cpu(
    arguments: argparse.Namespace, config: Mapping[str, Any] | None, processes: Processes
) -> tuple[argparse.Namespace, dict[str, Any], dict[str, str]]:
    """Return arguments, config and variables with which accelerate starts all CPU processes, through torchrun."""
    values = {"num_processes": processes.asked, **(config or {}), "distributed_type": "MULTI_GPU", "use_cpu": True}
    values.pop("gpu_ids", None)
    return _changed(arguments, cpu=False), values, {"ACCELERATE_USE_CPU": "true"}


def _shares(settings: Settings) -> bool:
    policy = settings.build().policy
    return policy.facts.communicates


def _warning(settings: Settings, processes: Processes) -> list[str]:
    if processes.alone:
        remedy = "On CPU set use_cpu: true in the config file or pass --cpu."
        if processes.kind in ("FSDP", "MEGATRON_LM"):
            remedy = f"accelerate runs {processes.kind} on accelerators only."
        return [
            f"warning: no accelerator here, so each of {processes.asked} processes trains alone and {settings.recipe} "
            f"has nothing to share. {remedy}"
        ]
    if processes.world == 1:
        return [f"warning: one process only, so {settings.recipe} has nothing to share. {_SETTING}"]
    return []


def _through_run(arguments: argparse.Namespace) -> argparse.Namespace:
    script = [arguments.training_script, *arguments.training_script_args]
    rest = ["-m", *script] if arguments.module else script
    return _changed(arguments, module=True, training_script="distnorm.run", training_script_args=rest)


def _changed(arguments: argparse.Namespace, **values: object) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(arguments), **values})


def _write(job: Job, folder: str) -> str:
    import yaml

    name = Path(job.file.path).stem if job.file is not None else "config"
    copy = Path(folder) / f"{name}.yaml"
    copy.write_text(yaml.safe_dump(job.config, sort_keys=False), encoding="utf-8")
    return str(copy)


@contextmanager
def _arguments_of_the_process(arguments: Sequence[str]) -> Iterator[None]:
    """Set ``sys.argv``, from which accelerate's help chooses what to show."""
    before = sys.argv
    sys.argv = ["distnorm launch", *arguments]
    try:
        yield
    finally:
        sys.argv = before
