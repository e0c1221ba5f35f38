"""``<launcher> -m distnorm.run [options] train.py args``: convert the models of a script that stays as it is.

Each model is converted just before DistributedDataParallel, FSDP or DeepSpeed wraps it. Works wherever ``-m`` does:
torchrun, ``accelerate launch -m``, ``deepspeed --module``, ``mpirun python -m``, plain Python.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import get_args

from distnorm.integrations.children import convert_in_children
from distnorm.integrations.launchers import read_launcher
from distnorm.integrations.mpi import export_environment
from distnorm.integrations.script import run_module, run_script
from distnorm.integrations.wrapping import install
from distnorm.settings import OPTIONS_EXAMPLE, from_environment
from distnorm.transport.mpi import end_job_after
from distnorm.types import Transport
from distnorm.validation import read_json

_DESCRIPTION = """\
  torchrun --nproc_per_node 2 -m distnorm.run --recipe sync_bn train.py --lr 0.1
  mpirun -n 2 python -m distnorm.run train.py

Run a script as it is. Its models are converted just before DDP, FSDP or
DeepSpeed wraps them. Options come before the script. What no option says comes
from the environment (DISTNORM_RECIPE and so on), then from the config file.
"""
_TAKES_VALUE = ("--recipe", "--options", "--where", "--transport")
_LAUNCHER_FLAGS = ("--local_rank", "--local-rank")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the script that ``arguments`` name, ``sys.argv[1:]`` by default.

    Raises:
        SystemExit: what the script exits with, or 2 for a wrong call or settings that are not allowed.
        BaseException: what the script raises.
    """
    own, as_module, target, rest = _split(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(own)
    if target is None:
        parser.error("name the script to run, or -m and a module.")
    try:
        flags = {key: getattr(options, key) for key in ("recipe", "options", "where", "fuse", "ledger", "transport")}
        if options.options is not None:
            flags["options"] = read_json(options.options, "flag --options", OPTIONS_EXAMPLE)
        settings = from_environment(os.environ, flags)
    except ValueError as error:
        _refuse(str(error))
    _meet()
    job = install(settings)
    convert_in_children(job, settings, own)
    try:
        if as_module:
            run_module(target, rest)
        else:
            _check(target)
            run_script(target, rest)
    except SystemExit as end:
        job.failed = end.code not in (None, 0)
        end_job_after(end)
        raise
    except BaseException:
        job.failed = True
        raise


def _meet() -> None:
    """Where mpirun or srun started the ranks, export what ``env://`` reads, for scripts that expect torchrun's."""
    if "RANK" not in os.environ and read_launcher(os.environ) is not None:
        try:
            export_environment()
        except (ImportError, RuntimeError, ValueError) as error:  # the script may know a way of its own
            print(f"distnorm.run: RANK and MASTER_ADDR are not exported: {error}", file=sys.stderr)


def _split(arguments: Sequence[str]) -> tuple[list[str], bool, str | None, list[str]]:
    """Our own options, whether a module is named, the script or module, and what belongs to it.

    Not left to argparse, which looks for options behind the script too and takes a ``--`` out of its arguments.
    The local rank that deepspeed and older launchers put first is the script's.
    """
    own: list[str] = []
    forwarded: list[str] = []
    waiting = list(arguments)
    while waiting and waiting[0].startswith("-") and waiting[0] != "-m":
        flag = waiting.pop(0)
        kept = forwarded if flag.partition("=")[0] in _LAUNCHER_FLAGS else own
        kept.append(flag)
        if waiting and flag in (*_TAKES_VALUE, *_LAUNCHER_FLAGS):
            kept.append(waiting.pop(0))
    as_module = waiting[:1] == ["-m"]
    named = waiting[1:] if as_module else waiting
    return own, as_module, (named[0] if named else None), [*forwarded, *named[1:]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="distnorm.run",
        usage="<launcher> -m distnorm.run [options] (script | -m module) [its arguments]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", metavar="NAME", help="or with options: 'group_bn(size=4)'; default: sync_bn")
    parser.add_argument("--options", metavar="JSON", help="the recipe's options: '{\"size\": 4}'")
    parser.add_argument("--where", metavar="PATTERNS", help="layers to convert: 'backbone.*,neck.*'; default: all")
    parser.add_argument(
        "--fuse", action=argparse.BooleanOptionalAction, default=None, help="norms do the ReLU and addition behind them"
    )
    parser.add_argument(
        "--ledger", action=argparse.BooleanOptionalAction, default=None, help="print the collectives at the end"
    )
    parser.add_argument("--transport", metavar="NAME", help=f"who carries statistics: {', '.join(get_args(Transport))}")
    return parser


def _check(path: str) -> None:
    """As Python does, in one line and with its exit code; an OSError of the script's own must not look like it."""
    try:
        if not os.path.isdir(path):
            with open(path, "rb"):
                pass
    except OSError as error:
        _refuse(f"can't open file {os.path.abspath(path)!r}: [Errno {error.errno}] {error.strerror}")


def _refuse(message: str) -> None:
    print(f"distnorm.run: error: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
