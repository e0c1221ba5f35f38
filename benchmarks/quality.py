"""How good are networks that each way of normalizing trains? The study behind docs/quality.md.

    launch/mpirun.sh 2 benchmarks/quality.py

Every run trains the same small network from the same weights on the same images; only the normalization differs. Each
finished run is a line in a file, and a run that has its line is not run again: an interrupted study goes on where it
stopped. After a change to the study, delete the file.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from datetime import timedelta
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from digits_task import (
    DEMO,
    Difficulty,
    Digits,
    build_network,
    distort,
    scanner_of,
    seeded,
    split_digits,
    validation_views,
)
from study import pending, run_all

import distnorm
from distnorm.integrations import mpi
from distnorm.integrations.launchers import read_launcher
from distnorm.types import Transport

RESULTS = Path(__file__).parent.parent / "docs" / "quality.jsonl"

STOCK = "stock"  # nn.BatchNorm2d as torch has it: nothing is converted
# Under mpirun statistics travel by MPI: the same bits (tests/integrations/test_mpi.py), sooner.
TRANSPORT: Transport = "torch" if read_launcher(os.environ) is None else "mpi"
GROUP_NORM = "group_norm"  # nn.GroupNorm in its place: statistics of one image, nothing to share
CONTENDERS = (
    STOCK,
    GROUP_NORM,
    "local_bn",
    "sync_bn",
    "mabn",
    "lazy_bn(window=1)",
    "hierarchical_mabn",
    "local_bn(weights='centralized')",
    "sync_bn(weights='centralized')",
    "mabn(weights='none')",
    "lazy_bn(window=1, weights='none')",
)
DIFFICULTIES = {
    1: DEMO._replace(gain_range=0.0, offset_range=0.0),
    2: DEMO,
    3: Difficulty(gain_range=0.7, offset_range=0.8, noise=0.3),
}
BATCHES = (2, 4, 1, 8)  # per rank; the one that the goal names comes first
SEEDS = range(10)

# What was chosen, and the seeds it was chosen on.
TUNING_SEEDS = range(100, 103)
RATES = (0.005, 0.01, 0.02)
RATE = 0.01
WINDOWS = (4, 8, 16, 32)
WARMUPS = (16, 50, 100)

STEPS = 300
TAIL = 30  # steps whose mean loss is the final loss
DEPTH = 2
GRID = 2
GROUPS = 4
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


class Cell(NamedTuple):
    """One run of the study."""

    difficulty: int
    batch: int
    contender: str
    seed: int
    rate: float = RATE


class Task(NamedTuple):
    """What a run trains on, and what it is judged by."""

    images: Tensor  # [steps, batch, 1, 8, 8], of this rank
    labels: Tensor  # [steps, batch], of this rank
    validation: Digits


def comparison() -> list[Cell]:
    """The study itself. Whole seeds, so that an early look sees every contender equally often."""
    difficulties = sorted(DIFFICULTIES, key=lambda level: level != 2)
    return [Cell(d, b, c, s) for s, b, d, c in product(SEEDS, BATCHES, difficulties, CONTENDERS)]


def rates() -> list[Cell]:
    """The learning rate, on seeds that the study does not use."""
    chosen = ("sync_bn", GROUP_NORM, "mabn")
    return [Cell(d, 2, c, s, r) for d, r, s, c in product(DIFFICULTIES, RATES, TUNING_SEEDS, chosen)]


def tuning() -> list[Cell]:
    """Window and warm-up of ``mabn``, on seeds that the study does not use."""
    options = product(WINDOWS, WARMUPS, TUNING_SEEDS)
    return [Cell(2, 2, f"mabn(window={window}, warmup={warmup})", seed) for window, warmup, seed in options]


STUDIES = {"rates": rates, "tuning": tuning, "comparison": comparison}


def main() -> None:
    """Run what has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--study", choices=STUDIES, nargs="+", default=list(STUDIES))
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON lines; runs found there are not run again")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps per run")
    parser.add_argument("--limit", type=int, help="stop after so many runs")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the ranks share the cores, and the images are tiny
    # Rank 1 waits in a collective while rank 0 writes; on a busy machine nobody should give up on the other.
    mpi.init_process_group("gloo", timeout=timedelta(hours=1))
    try:
        cells = [cell for study in options.study for cell in STUDIES[study]()]
        run_all(pending(cells, options.output)[: options.limit], options.output, partial(run, steps=options.steps))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(cell: Cell, steps: int) -> dict[str, float]:
    """Train and evaluate; accuracy in percent and the final loss, the same on all ranks."""
    task = prepare(cell.difficulty, cell.batch, cell.seed, steps)
    network = normalized(build_network(cell.seed, DEPTH, GRID), cell.contender)
    loss = train(network, task, cell.rate)
    if any(isinstance(each, distnorm.DistNorm) for each in network.modules()):
        distnorm.sync_running_stats(network)
    # Stock running statistics are rank 0's, by DDP's broadcasts in training; and so it is rank 0 who evaluates.
    outcome = torch.tensor([accuracy_of(network, *task.validation) if dist.get_rank() == 0 else 0.0, loss])
    dist.all_reduce(outcome)
    accuracy, losses = outcome.tolist()
    return {"accuracy": round(accuracy, 2), "final_loss": round(losses / dist.get_world_size(), 4), "steps": steps}


@lru_cache(maxsize=1)
def prepare(level: int, batch: int, seed: int, steps: int) -> Task:
    """Draw all images of a run in advance: each is distorted anew whenever it comes up."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    difficulty = DIFFICULTIES[level]
    digits, clean = split_digits(seed)
    generator = seeded(seed)  # in the same state on all ranks, which draw the same and take their parts of it
    count = steps * world_size * batch
    epochs = math.ceil(count / len(digits.labels))
    order = torch.cat([torch.randperm(len(digits.labels), generator=generator) for _ in range(epochs)])[:count]
    drawn = distort(digits.images[order], generator, difficulty).view(steps, world_size, batch, 1, 8, 8)
    images = scanner_of(rank, world_size, difficulty).scan(drawn[:, rank]).contiguous()
    labels = digits.labels[order].view(steps, world_size, batch)[:, rank].contiguous()
    return Task(images, labels, validation_views(clean, world_size, seed, difficulty))


def normalized(network: nn.Module, contender: str) -> nn.Module:
    """Put the normalization of ``contender`` in the place of stock batch norm."""
    if contender == GROUP_NORM:
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, nn.GroupNorm(GROUPS, child.num_features))
    elif contender != STOCK:
        distnorm.convert(network, distnorm.recipes.parse(contender), transport=TRANSPORT)
    return network


def train(network: nn.Module, task: Task, rate: float) -> float:
    """Train ``network`` in place; this rank's mean loss over the last steps."""
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, len(task.images))
    losses = []
    for images, labels in zip(task.images, task.labels, strict=True):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-TAIL:]).mean())


@torch.no_grad()
def accuracy_of(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """How many of ``images`` the network reads correctly, in percent. One rank calls this alone: no collective."""
    network.eval()
    answers = torch.cat([network(part).argmax(dim=1) for part in images.split(1000)])
    return 100 * float((answers == labels).float().mean())


if __name__ == "__main__":
    main()
