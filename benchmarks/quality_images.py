"""How good are networks that each way of normalizing trains on your own pictures?

    torchrun --standalone --nproc_per_node 2 benchmarks/quality_images.py --data photos.npz --output runs.jsonl

Every run trains the same small network from the same weights on the same images in the same order; only the
normalization differs. Each finished run is a line of ``--output``, and what has its line is not run again.
``quality_images_report.py`` makes tables of them. docs/quality.md says more.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pictures import Labelled, Pictures, load_pictures
from quality import GROUP_NORM, MOMENTUM, STOCK, accuracy_of, normalized
from study import pending, run_all
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm.integrations import mpi

CONTENDERS = (
    "sync_bn(weights='centralized')",
    "local_bn(weights='centralized')",
    "sync_bn",
    "local_bn",
    "mabn",
    "lazy_bn",
)
LAYERS = ((16, 1), (16, 2), (32, 1), (32, 2), (64, 1), (64, 1))  # channels, stride
WEIGHT_DECAY = 1e-4


class Cell(NamedTuple):
    """One run of the study."""

    data: str
    contender: str
    seed: int
    epochs: int
    batch: int  # per rank
    ranks: int
    rate: float


def main() -> None:
    """Run what has no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="an .npz, or a folder with one folder per class")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; runs found there are not run again")
    parser.add_argument("--contenders", type=contender_of, nargs="+", default=list(CONTENDERS), metavar="RECIPE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of weights and order; one run for each")
    parser.add_argument("--epochs", type=int, default=5, help="of a run; the cosine schedule is as long")
    parser.add_argument("--batch", type=int, default=2, help="images per rank and step")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.02], help="learning rates; one run for each")
    parser.add_argument("--size", type=int, default=32, help="pixels of the pictures of a folder")
    parser.add_argument("--held-out", type=float, default=0.2, help="part of a folder's pictures that validates")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the ranks share the cores, and the batches are tiny
    mpi.init_process_group("gloo", timeout=timedelta(hours=1))
    try:
        pictures = load_pictures(options.data, options.size, options.held_out)
        rest = (options.epochs, options.batch, dist.get_world_size())
        runs = product(options.seeds, options.rates, options.contenders)
        cells = [Cell(pictures.name, contender, seed, *rest, rate) for seed, rate, contender in runs]
        run_all(pending(cells, options.output), options.output, partial(run, pictures=pictures))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def contender_of(text: str) -> str:
    """The name that results go by, however the options of a recipe are quoted and spaced."""
    if text in (STOCK, GROUP_NORM):
        return text
    try:
        return str(distnorm.recipes.parse(text).name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error} Or take {STOCK} or {GROUP_NORM}.") from None


def run(cell: Cell, pictures: Pictures) -> dict[str, Any]:
    """Train, and evaluate after every epoch: rank 0's figures count."""
    classes = int(pictures.train.labels.max()) + 1
    network = normalized(build_network(cell.seed, pictures.train.images.shape[1], classes), cell.contender)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), cell.rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(cell.seed)  # in the same state on all ranks, and so are orders
    steps = len(pictures.train.labels) // (cell.batch * cell.ranks)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, cell.epochs * steps)
    losses, accuracies, started = [], [], time.perf_counter()
    for _ in range(cell.epochs):
        order = torch.randperm(len(pictures.train.labels), generator=generator)
        parts = order[: steps * cell.ranks * cell.batch].view(steps, cell.ranks, cell.batch)[:, dist.get_rank()]
        with distnorm.Ledger(network) as ledger:
            losses.append(round(train(model, optimizer, schedule, pictures.train, parts), 4))
        accuracies.append(round(evaluate(network, pictures.validation), 2))
    return {
        "accuracies": accuracies,
        "losses": losses,
        "seconds": round(time.perf_counter() - started, 1),
        "collectives_per_step": round(ledger.collectives / steps, 2),  # of the last epoch
        "steps_per_epoch": steps,
        "host": f"{platform.node()}, {platform.machine()}, {os.cpu_count()} cores",
    }


def build_network(seed: int, channels: int, classes: int) -> nn.Module:
    """A small classifier with stock batch norm; equal seeds give equal weights."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for width, stride in LAYERS:
        convolution = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    pictures: Labelled,
    parts: Tensor,
) -> float:
    """Take a step for each row of ``parts``, indices of this rank's images; the mean loss of this rank."""
    model.train()
    total = torch.zeros(())
    for part in parts:
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(pictures.images[part]), pictures.labels[part])
        loss.backward()
        optimizer.step()
        schedule.step()
        total += loss.detach()
    return float(total) / len(parts)


def evaluate(network: nn.Module, pictures: Labelled) -> float:
    """Accuracy in percent on rank 0, whose running statistics DDP keeps of stock layers; elsewhere 0. Collective."""
    if any(isinstance(each, distnorm.DistNorm) for each in network.modules()):
        distnorm.sync_running_stats(network)
    return accuracy_of(network, *pictures) if dist.get_rank() == 0 else 0.0


if __name__ == "__main__":
    main()
