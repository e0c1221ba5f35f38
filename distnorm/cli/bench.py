"""``distnorm bench``: measure what each recipe costs on this cluster, for the user's model."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from distnorm.cli.named import build_model, load
from distnorm.diagnostics import draw
from distnorm.diagnostics.bench import ProgressCallback, Report, measure
from distnorm.integrations import mpi
from distnorm.integrations.launchers import has_rendezvous, read_launcher
from distnorm.recipes import parse

_LOCAL_RANKS = 2
"""The number of ranks on this machine, if there is no launcher."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.usage = "[launcher] distnorm bench --model MODULE:FUNCTION [options]"
    parser.description = f"""\
  torchrun --nproc_per_node 8 -m distnorm bench --model my_models:resnet
  mpirun -n 16 python -m distnorm bench --model my_models:resnet
  distnorm bench --model my_models:resnet --shape 3,64,64 --seconds 20

Measure, with your model on your ranks, how long sums take and what each recipe
adds to a step. Without a launcher it starts {_LOCAL_RANKS} ranks on this machine's CPU.
docs/bench.md explains the figures.
"""
    add = parser.add_argument
    add("--model", required=True, metavar="MODULE:FUNCTION", help="returns the model; takes no arguments")
    add("--input", metavar="MODULE:FUNCTION", help="returns the input: a tensor, tuple or dict")
    add("--shape", metavar="N,N,...", help="in place of --input: random samples; default: 3,224,224")
    add("--batch", type=int, metavar="N", help="samples per rank with --shape; default: 4")
    add(
        "--recipes",
        nargs="+",
        metavar="RECIPE",
        help="default: local_bn, sync_bn, mabn, lazy_bn, and on several nodes those with two levels",
    )
    add("--seconds", type=float, default=60.0, metavar="N", help="of measuring; default: %(default)g")
    add("--device", choices=["cpu", "cuda"], help="default: cuda, if there is one and a launcher")
    add("--json", type=Path, metavar="FILE", help="write the figures, for `distnorm plan --measured`")
    add("--picture", type=Path, metavar="FILE", help="draw it; needs matplotlib")


def main(chosen: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Run the command, whose command line is ``arguments``. Return 0, or 2 after an error message."""
    try:
        _check(chosen)
        if not has_rendezvous(os.environ) and read_launcher(os.environ) is None:
            return _start_ranks(arguments)
        return _run(chosen)
    except (ImportError, ValueError, OSError) as error:
        if _is_first():
            print(f"distnorm bench: error: {error}", file=sys.stderr)
        return 2


def _is_first() -> bool:
    """Return whether this is rank 0 by the launcher's variables, since there may be no process group yet."""
    place = read_launcher(os.environ)
    return os.environ.get("RANK", "0" if place is None else str(place.rank)) == "0"


def _check(chosen: argparse.Namespace) -> None:
    if chosen.seconds <= 0:
        raise ValueError(f"--seconds {chosen.seconds:g}: need more than 0.")
    if chosen.input is not None and (chosen.shape is not None or chosen.batch is not None):
        raise ValueError("--input, and --shape with --batch, both define the input of the model: give one of them.")
    if chosen.batch is not None and chosen.batch < 1:
        raise ValueError(f"--batch {chosen.batch}: need at least 1.")
    for path in (chosen.json, chosen.picture):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no directory {path.parent}.")
    for name in chosen.recipes or ():
        parse(name)
    _shape(chosen)
    build_model(chosen.model, meta=True)
    if chosen.input is not None:
        load(chosen.input, "--input")


def _start_ranks(arguments: Sequence[str]) -> int:
    """Run the same command on local ranks with torchrun, with one thread each, which is torchrun's default."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(_LOCAL_RANKS), "-m", "distnorm"]
    print(f"no launcher: starting {_LOCAL_RANKS} ranks on the CPU of this machine", file=sys.stderr)
    device = [] if "--device" in arguments else ["--device", "cpu"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run([sys.executable, *launcher, *arguments, *device], env=environment, check=False).returncode


def _run(chosen: argparse.Namespace) -> int:
    device = _device(chosen.device)
    mpi.init_process_group("gloo" if device.type == "cpu" else None)
    try:
        first = dist.get_rank() == 0
        progress = _Progress(chosen.seconds, show=first)
        batch = _batch(chosen)
        report = measure(
            chosen.model,
            lambda: build_model(chosen.model),
            batch,
            chosen.recipes,
            device,
            chosen.seconds,
            progress.callback,
        )
        progress.close()
        if first:
            _write(report, chosen)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0


def _write(report: Report, chosen: argparse.Namespace) -> None:
    print(report.table())
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(report.record(), indent=1) + "\n")
    if chosen.picture is not None:
        draw.to_file(draw.draw_bench, report, chosen.picture)


def _device(wanted: str | None) -> torch.device:
    if (wanted or ("cuda" if torch.cuda.is_available() else "cpu")) == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device here; allowed is cpu.")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _shape(chosen: argparse.Namespace) -> list[int]:
    text = chosen.shape or "3,224,224"
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--shape {text!r}: need whole numbers above 0, separated by commas, such as 3,224,224.")
    return [int(part) for part in parts]


def _batch(chosen: argparse.Namespace) -> tuple[str, object]:
    torch.manual_seed(1 + dist.get_rank())
    if chosen.input is not None:
        return chosen.input, load(chosen.input, "--input")()
    shape = [chosen.batch or 4, *_shape(chosen)]
    return f"a batch of {' x '.join(map(str, shape))}", torch.randn(shape)


class _Progress:
    """A progress bar on stderr if that is a terminal and tqdm is installed; else a line per tenth of the budget."""

    def __init__(self, seconds: float, *, show: bool) -> None:
        self._seconds = seconds
        self._show = show
        self._shown = -1
        self._bar = None
        if show and sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None:
            from tqdm import tqdm

            self._bar = tqdm(total=round(seconds, 1), unit="s", bar_format="{desc:8}{percentage:3.0f}% {bar} {elapsed}")

    @property
    def callback(self) -> ProgressCallback:
        return self._bar_to if self._bar is not None else self._line

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _bar_to(self, what: str, part: float) -> None:
        assert self._bar is not None
        self._bar.set_description_str(what, refresh=False)
        self._bar.update(part * self._bar.total - self._bar.n)

    def _line(self, what: str, part: float) -> None:
        if self._show and int(part * 10) > self._shown:
            self._shown = int(part * 10)
            print(f"distnorm bench: {what}, {part:.0%} of {self._seconds:g} s", file=sys.stderr, flush=True)
