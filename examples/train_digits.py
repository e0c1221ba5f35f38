"""Train a small network on handwritten digits with two images per rank, and compare ways to normalize.

Start one process per rank; two CPU cores are enough:

    torchrun --standalone --nproc_per_node 2 examples/train_digits.py --compare

The comparison trains the same network, from the same weights, on the same images, once per recipe and seed. It ends
with a table on stdout and a picture of the accuracy curves. Without ``--compare`` one recipe is trained once.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from digits_report import Run, draw_curves, format_table
from digits_task import Digits, build_network, distort, scanner_of, seeded, split_digits, validation_views
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import distnorm

STOCK = "stock"  # nn.BatchNorm2d as torch has it: nothing is converted
RECIPES = (STOCK, "local_bn", "sync_bn", "mabn", "lazy_bn")  # to compare another recipe, add its name
LEARNING_RATE = 0.01
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


def main() -> None:
    """Do what the command line asks for."""
    options = parse_options()
    torch.set_num_threads(1)  # the ranks share the cores, and the images are tiny
    dist.init_process_group("gloo")
    try:
        if options.compare:
            compare(options.recipes, options.seeds, options.epochs, options.batch_size, options.output)
        else:
            train_one(options.recipe, options.seeds[0], options.epochs, options.batch_size)
        # Rank 0 evaluates and reports alone. A rank that left meanwhile could end while gloo still tidies up.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    known = ", ".join([STOCK, *(each.name for each in distnorm.recipes.available())])
    parser = argparse.ArgumentParser(description="Train on handwritten digits; compare ways to normalize.")
    parser.add_argument("--compare", action="store_true", help="train all --recipes with all --seeds")
    parser.add_argument(
        "--recipes",
        nargs="+",
        metavar="RECIPE",
        default=list(RECIPES),
        help=f'any of {known}; with options as in "group_bn(size=2)"',
    )
    parser.add_argument("--recipe", metavar="RECIPE", default="sync_bn", help="trained without --compare")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="without --compare, the first one")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--batch-size", type=int, default=2, help="images per rank and step")
    parser.add_argument("--output", type=Path, default=Path("digits_curves.png"), help="the picture of --compare")
    options = parser.parse_args()
    if not dist.is_torchelastic_launched():
        parser.error("start me with torchrun, one process per rank.")
    return options


def compare(recipes: Sequence[str], seeds: Sequence[int], epochs: int, batch_size: int, output: Path) -> None:
    """Train every recipe with every seed; rank 0 prints the table and draws the curves."""
    runs = train_all(recipes, seeds, epochs, batch_size)
    if dist.get_rank() == 0:
        print(format_table(runs, {recipe: staleness(recipe) for recipe in recipes}))
        draw_curves(runs, output)
        print(f"\nValidation accuracy by epoch: {output}")


def train_one(recipe: str, seed: int, epochs: int, batch_size: int) -> None:
    """Train one recipe with one seed; rank 0 prints its accuracy."""
    (run,) = train_all([recipe], [seed], epochs, batch_size)
    if dist.get_rank() == 0:
        print(f"{recipe}, seed {seed}: validation accuracy {run.curve[-1]:.1f} %")


def staleness(recipe: str) -> int:
    """Return by how many steps the statistics of ``recipe`` are late."""
    return 0 if recipe == STOCK else distnorm.recipes.parse(recipe).policy.facts.staleness


def train_all(recipes: Sequence[str], seeds: Sequence[int], epochs: int, batch_size: int) -> list[Run]:
    """Train every recipe with every seed, one run after the other, under one progress bar on rank 0."""
    plan = [(recipe, seed) for seed in seeds for recipe in recipes]
    runs = []
    with tqdm(disable=dist.get_rank() != 0, unit="step", mininterval=1.0, file=sys.stderr) as progress:
        for recipe, seed in plan:
            trainer = Trainer(recipe, seed, epochs, batch_size)
            progress.total = len(plan) * trainer.steps
            progress.set_description(f"{recipe}, seed {seed}")
            runs.append(trainer.train(progress))
    return runs


class Trainer:
    """One run: a recipe, a seed. All but the recipe is equal for all contenders."""

    def __init__(self, recipe: str, seed: int, epochs: int, batch_size: int) -> None:
        world_size = dist.get_world_size()
        self.digits, clean = split_digits(seed)
        self.validation = validation_views(clean, world_size, seed)
        self.generator = seeded(seed)
        self.run = Run(recipe)
        self.epochs = epochs
        self.batch_size = batch_size
        self.steps_per_epoch = len(self.digits.images) // (batch_size * world_size)
        self.steps = epochs * self.steps_per_epoch
        self.network = build_network(seed)
        if recipe != STOCK:
            distnorm.convert(self.network, distnorm.recipes.parse(recipe))
        # Stock running statistics are rank 0's, by DDP's broadcasts; `evaluate` unites those of converted networks.
        self.model = DistributedDataParallel(self.network)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, LEARNING_RATE, self.steps)

    def train(self, progress: tqdm[None]) -> Run:
        """Train to the end, moving ``progress`` by one each step, and return what was measured."""
        for _ in range(self.epochs):
            with distnorm.Ledger(self.network) as ledger:
                for images, labels in self.batches():
                    start = time.perf_counter()
                    self.step(images, labels)
                    self.run.step_seconds.append(time.perf_counter() - start)
                    progress.update()
            self.run.collectives += ledger.collectives
            self.run.payload += ledger.bytes
            self.evaluate()
        return self.run

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's images and labels of one epoch."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        # Generators of all ranks are in the same state: they draw the same order, and each rank takes its part of it.
        order = torch.randperm(len(self.digits.images), generator=self.generator)
        images = scanner_of(rank, world_size).scan(distort(self.digits.images, self.generator))
        full = self.steps_per_epoch * self.batch_size * world_size
        for index in order[rank:full:world_size].split(self.batch_size):
            yield images[index], self.digits.labels[index]

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Take one optimizer step."""
        self.optimizer.zero_grad()
        functional.cross_entropy(self.model(images), labels).backward()
        self.optimizer.step()
        self.schedule.step()

    def evaluate(self) -> None:
        """Add a point to the accuracy curve. Rank 0 alone; the others go on and wait in their next collective."""
        if self.run.recipe != STOCK:
            distnorm.sync_running_stats(self.network)
        if dist.get_rank() == 0:
            self.run.curve.append(accuracy(self.network, self.validation))


@torch.no_grad()
def accuracy(network: nn.Module, digits: Digits) -> float:
    """Return how many of ``digits`` the network reads correctly, in percent.

    Takes the network itself, not its DDP wrapper: one rank calls this alone, so nothing may communicate.
    """
    network.eval()
    correct = network(digits.images).argmax(dim=1) == digits.labels
    network.train()
    return 100 * float(correct.float().mean())


if __name__ == "__main__":
    main()
