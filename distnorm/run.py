"""``<launcher> -m distnorm.run [options] train.py args``: convert the models of an unmodified script.

Each model is converted just before DistributedDataParallel, FSDP or DeepSpeed wraps it. Works with every launcher that
has ``-m``: torchrun, ``accelerate launch -m``, ``deepspeed --module``, ``mpirun python -m``, plain Python.
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
from distnorm.integrations.script import report_to_launcher, run_module, run_script
from distnorm.integrations.wrapping import install
from distnorm.settings import KEYS, OPTIONS_EXAMPLE, from_environment
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
    """Run the script that ``arguments`` name; they are ``sys.argv[1:]`` by default.

    Raises:
        SystemExit: the script's own exit, or 2 for wrong arguments or settings.
        BaseException: any exception of the script.
    """
    own, is_module, target, rest = _split(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(own)
    if target is None:
        parser.error("need a script to run, or -m and a module.")
    try:
        flags = {key: getattr(options, key) for key in KEYS}
        if options.options is not None:
            flags["options"] = read_json(options.options, "flag --options", OPTIONS_EXAMPLE)
        settings = from_environment(os.environ, flags)
    except ValueError as error:
        _refuse(str(error))
    _export_launcher_environment()
    job = install(settings)
    convert_in_children(job, flags)
    try:
        if is_module:
            run_module(target, rest)
        else:
            _check_readable(target)
            run_script(target, rest)
    except SystemExit as end:
        job.failed = end.code not in (None, 0)
        if job.failed:
            report_to_launcher(end)
        end_job_after(end)
        raise
    except BaseException as error:
        job.failed = True
        report_to_launcher(error)
        raise


def _export_launcher_environment() -> None:
    """Export the variables that ``env://`` reads if mpirun or srun started the ranks, as torchrun would."""
    if "RANK" not in os.environ and read_launcher(os.environ) is not None:
        try:
            export_environment()
        except (ImportError, RuntimeError, ValueError) as error:  # the script may initialize torch.distributed itself
            print(f"distnorm.run: RANK and MASTER_ADDR are not exported: {error}", file=sys.stderr)


def _split(arguments: Sequence[str]) -> tuple[list[str], bool, str | None, list[str]]:
    """Return the options of distnorm.run, whether a module follows, the script or module, and its arguments.

    argparse cannot do this: it would look for options behind the script too, and remove a ``--`` from its arguments.
    The local rank that deepspeed and older launchers put first is passed on to the script.
    """
    own: list[str] = []
    forwarded: list[str] = []
    remaining = list(arguments)
    while remaining and remaining[0].startswith("-") and remaining[0] != "-m":
        flag = remaining.pop(0)
        options = forwarded if flag.partition("=")[0] in _LAUNCHER_FLAGS else own
        options.append(flag)
        if remaining and flag in (*_TAKES_VALUE, *_LAUNCHER_FLAGS):
            options.append(remaining.pop(0))
    is_module = remaining[:1] == ["-m"]
    target = remaining[1:] if is_module else remaining
    return own, is_module, (target[0] if target else None), [*forwarded, *target[1:]]


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
    parser.add_argument(
        "--where", metavar="PATTERNS", help="layers to convert: 'backbone.*,neck.*', or 'Net: *; Critic: neck.*'"
    )
    parser.add_argument(
        "--fuse", action=argparse.BooleanOptionalAction, default=None, help="norms do the ReLU and addition behind them"
    )
    parser.add_argument(
        "--ledger", action=argparse.BooleanOptionalAction, default=None, help="print the collectives at the end"
    )
    parser.add_argument(
        "--save-state",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="keep moving statistics beside the script's checkpoints",
    )
    parser.add_argument(
        "--transport", metavar="NAME", help=f"transport of statistics: {', '.join(get_args(Transport))}"
    )
    return parser


def _check_readable(path: str) -> None:
    """Exit as Python does if ``path`` cannot be read, before the script runs and may raise an OSError itself."""
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
