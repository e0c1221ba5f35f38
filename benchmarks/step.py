"""A whole training step: ResNet-18 for 32x32 images under DDP, one row per way to normalize.

Run ``torchrun --standalone --nproc_per_node 2 benchmarks/step.py``, or under ``launch/mpirun.sh 2``, where statistics
can travel by MPI as well. Steps of all contenders alternate in one process. Exposed communication is a step less the
``local_bn`` step of the same round. Rank 0 prints a Markdown table; ``--json`` writes every step's time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
from measure import exposed_ratio, ratio, rounds
from models import CLASSES, IMAGE, resnet18
from peers import GatherNorm, NaiveNorm, replace_norms
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm.integrations import mpi

PEERS: dict[str, type[nn.Module]] = {"none": nn.Identity, "gather": GatherNorm, "naive": NaiveNorm}
DEFAULT = ("stock", "local_bn", "sync_bn", "gather", "naive", "none")


def build(contender: str, width: int) -> nn.Module:
    """The model of ``contender``: ``stock``, a peer, or a recipe; ``mpi:RECIPE`` shares by MPI."""
    model = resnet18(width)
    if contender in PEERS:
        return replace_norms(model, PEERS[contender])
    if contender == "stock":
        return model
    transport, _, recipe = contender.rpartition(":")
    return distnorm.convert(model, distnorm.recipes.parse(recipe), transport="mpi" if transport == "mpi" else "torch")


def trainer(contender: str, width: int, batch: int) -> Callable[[], float]:
    """A function that takes one training step and returns its milliseconds."""
    model = build(contender, width)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    if contender != "stock" and contender not in PEERS:
        distnorm.attach(model, optimizer=optimizer)
    x = torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(dist.get_rank()))
    labels = torch.arange(batch) % CLASSES

    def step() -> float:
        dist.barrier()
        started = time.perf_counter()
        optimizer.zero_grad()
        functional.cross_entropy(wrapped(x), labels).backward()
        optimizer.step()
        return (time.perf_counter() - started) * 1e3

    return step


def report(seen: dict[str, list[float]], title: str) -> None:
    """Print the table."""
    base = seen.get("local_bn")
    print(f"{title}, {platform.machine()}, torch {torch.__version__}, {date.today()}\n")
    print("| | step, ms | over stock | exposed, ms | exposed over gather | exposed over naive |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, values in seen.items():
        cells = [name, f"{statistics.median(values):.1f}"]
        cells.append(str(ratio(values, seen["stock"])) if "stock" in seen else "")
        exposed = base and name != "local_bn"
        cells.append(f"{statistics.median(a - b for a, b in zip(values, base, strict=True)):.1f}" if exposed else "")
        for peer in ("gather", "naive"):
            compared = exposed and peer in seen and name not in (*PEERS, "stock")
            cells.append(str(exposed_ratio(values, seen[peer], base)) if compared and base else "")
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time training steps of a ResNet-18, side by side.")
    parser.add_argument("--contenders", nargs="+", default=list(DEFAULT))
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="images per rank")
    parser.add_argument("--runs", type=int, default=40, help="counted steps per contender")
    parser.add_argument("--json", type=Path, help="where rank 0 writes every step's time")
    options = parser.parse_args()
    torch.set_num_threads(1)
    mpi.init_process_group("gloo")
    steps = {name: trainer(name, options.width, options.batch) for name in options.contenders}
    seen = rounds(steps, options.runs)
    if dist.get_rank() == 0:
        report(seen, f"{dist.get_world_size()} ranks, width {options.width}, batch {options.batch}")
        if options.json:
            options.json.write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
