"""BNU-Net against U-Net: segment generated images with two images per rank.

    torchrun --standalone --nproc_per_node 2 examples/bnu_net.py [--quick]

A BNU-Net is a U-Net with batch norm after each convolution and ELU; the U-Net has no norm and ReLU. Both have the same
convolutions and see the same images. The images are generated, not measured: an ellipse with a texture of its own, in
front of another texture, beside rectangles that do not count, under noise; each image has its own brightness and
contrast. ``docs/bnu-net.md`` has a measured table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median, stdev

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import distnorm

PLAIN = "U-Net"
BATCH = 2  # images per rank and step
WIDTH = 8  # channels of the first level; every level below has twice as many
LEVELS = 3
RATE = 5e-3  # the highest of the schedule


@dataclass(frozen=True)
class Scale:
    """How much is trained and evaluated."""

    steps: int
    size: int
    """Pixels per side."""
    validated: int
    """Images."""
    seeds: tuple[int, ...]
    recipes: tuple[str, ...]


FULL = Scale(steps=800, size=48, validated=100, seeds=(0, 1, 2), recipes=("local_bn", "sync_bn", "mabn"))
QUICK = Scale(steps=40, size=24, validated=20, seeds=(0,), recipes=("local_bn", "sync_bn", "mabn(window=4, warmup=8)"))


@dataclass
class Run:
    """What one training run measured; scores are rank 0's alone."""

    contender: str
    dice: float = 0.0
    distance: float = 0.0
    collectives: int = 0
    step_seconds: list[float] = field(default_factory=list)


# --- the images ----------------------------------------------------------------------------------


def generate(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return images and masks, ``[count, 1, size, size]``; masks are 1 within the ellipse."""

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    grid = torch.linspace(-1, 1, size)
    rows, columns = grid.view(1, 1, -1, 1), grid.view(1, 1, 1, -1)

    def turned(angle: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()

    def stripes(frequency: Tensor) -> Tensor:
        along, _ = turned(draw(0, 3.14), columns, rows)
        return (frequency * along + draw(0, 6.28)).sin()

    x, y = turned(draw(0, 3.14), columns - draw(-0.4, 0.4), rows - draw(-0.4, 0.4))
    mask = ((x / draw(0.25, 0.5)) ** 2 + (y / draw(0.2, 0.4)) ** 2 < 1).float()
    image = 0.3 * stripes(draw(4, 8))
    for _ in range(2):
        x, y = turned(draw(0, 3.14), columns - draw(-0.9, 0.9), rows - draw(-0.9, 0.9))
        image = torch.where((x.abs() < draw(0.1, 0.3)) & (y.abs() < draw(0.1, 0.3)), 0.7, image)
    image = torch.where(mask > 0, 0.6 + 0.3 * stripes(draw(12, 20)), image)
    noise = torch.randn(image.shape, generator=generator)
    return draw(0.5, 2) * (image + 0.3 * noise) + draw(-1, 1), mask


# --- the networks --------------------------------------------------------------------------------


class UNet(nn.Module):
    """Two convolutions per level on the way down and up; with ``normed``, batch norm and ELU after each of them."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        widths = [WIDTH * 2**level for level in range(LEVELS)]
        self.down = nn.ModuleList(_block(a, b, normed) for a, b in zip([1, *widths], widths, strict=False))
        self.up = nn.ModuleList(_block(a + b, a, normed) for a, b in pairwise(widths))
        self.head = nn.Conv2d(WIDTH, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits of the shape of ``image``."""
        x, passed = image, []
        for level, block in enumerate(self.down):
            x = block(functional.max_pool2d(x, 2) if level else x)
            passed.append(x)
        for block, beside in zip(reversed(self.up), reversed(passed[:-1]), strict=True):
            x = block(torch.cat([beside, functional.interpolate(x, scale_factor=2.0)], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _block(inputs: int, outputs: int, normed: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before in (inputs, outputs):
        layers.append(nn.Conv2d(before, outputs, 3, padding=1, bias=not normed))
        layers += [nn.BatchNorm2d(outputs), nn.ELU()] if normed else [nn.ReLU()]
    return nn.Sequential(*layers)


# --- the scores ----------------------------------------------------------------------------------


def dice(found: Tensor, mask: Tensor) -> Tensor:
    """Return twice the common area over the sum of both areas, ``[N]``; 1 if both are empty."""
    both, areas = (found * mask).sum((1, 2, 3)), (found + mask).sum((1, 2, 3))
    return torch.where(areas > 0, 2 * both / areas.clamp(min=1), 1.0)


def boundary_distance(found: Tensor, mask: Tensor) -> Tensor:
    """Return the mean distance from pixels of one boundary to the nearest of the other, in pixels, both ways, ``[N]``.

    The image's diagonal if exactly one of the masks is empty, 0 if both are.
    """
    distances = []
    for one, other in zip(found[:, 0], mask[:, 0], strict=True):
        edge, its_edge = _boundary(one), _boundary(other)
        if len(edge) == 0 or len(its_edge) == 0:
            distances.append(0.0 if len(edge) == len(its_edge) else 2**0.5 * one.shape[-1])
            continue
        apart = torch.cdist(edge, its_edge)
        distances.append(float((apart.amin(0).mean() + apart.amin(1).mean()) / 2))
    return torch.tensor(distances)


def _boundary(mask: Tensor) -> Tensor:
    """Return the places of the pixels of ``mask`` with one of their 4 neighbours outside, ``[pixels, 2]``."""
    padded = functional.pad(mask, (1, 1, 1, 1))
    neighbours = [padded[2:, 1:-1], padded[:-2, 1:-1], padded[1:-1, 2:], padded[1:-1, :-2]]
    inner = torch.stack(neighbours).amin(0)
    return ((mask > 0) & (inner == 0)).nonzero().float()


# --- training ------------------------------------------------------------------------------------


def train(contender: str, seed: int, scale: Scale) -> Run:
    """Train the U-Net, or a BNU-Net with the recipe that ``contender`` names. Images depend on seed and rank only."""
    torch.manual_seed(seed)
    network = UNet(normed=contender != PLAIN)
    if contender != PLAIN:
        distnorm.convert(network, distnorm.recipes.parse(contender))
    model = DistributedDataParallel(network)
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, scale.steps)
    generator = torch.Generator().manual_seed(1000 * (seed + 1) + dist.get_rank())
    run = Run(contender)
    with distnorm.Ledger(network) as ledger:
        for _ in range(scale.steps):
            images, masks = generate(BATCH, scale.size, generator)
            start = time.perf_counter()
            optimizer.zero_grad()
            functional.binary_cross_entropy_with_logits(model(images), masks).backward()
            optimizer.step()
            schedule.step()
            run.step_seconds.append(time.perf_counter() - start)
    run.collectives = ledger.collectives
    if contender != PLAIN:
        distnorm.sync_running_stats(network)
    if dist.get_rank() == 0:
        evaluate(network, run, scale)
    return run


@torch.no_grad()
def evaluate(network: UNet, run: Run, scale: Scale) -> None:
    """Write the mean scores over images that no run was trained on into ``run``."""
    images, masks = generate(scale.validated, scale.size, torch.Generator().manual_seed(0))
    found = (network.eval()(images) > 0).float()
    run.dice, run.distance = float(dice(found, masks).mean()), float(boundary_distance(found, masks).mean())


def train_all(scale: Scale) -> list[Run]:
    """Train every contender with every seed."""
    return [train(contender, seed, scale) for seed in scale.seeds for contender in (PLAIN, *scale.recipes)]


# --- the report ----------------------------------------------------------------------------------


def table(runs: Sequence[Run]) -> str:
    """Format a row per contender: means over seeds, with standard deviations."""
    lines = [f"{'network':<36} {'Dice (%)':>12} {'boundary (px)':>14} {'collectives/step':>17} {'step (ms)':>10}"]
    for contender in dict.fromkeys(run.contender for run in runs):
        mine = [run for run in runs if run.contender == contender]
        name = contender if contender == PLAIN else f"BNU-Net, {contender}"
        seconds = [each for run in mine for each in run.step_seconds]
        sent = sum(run.collectives for run in mine) / len(seconds)
        scores = _spread([100 * run.dice for run in mine], 1), _spread([run.distance for run in mine], 2)
        lines.append(f"{name:<36} {scores[0]:>12} {scores[1]:>14} {sent:>17.1f} {1000 * median(seconds):>10.1f}")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    mean = f"{fmean(values):.{digits}f}"
    return f"{mean} ± {stdev(values):.{digits}f}" if len(values) > 1 else mean


def main() -> None:
    """Train, and let rank 0 print the table."""
    parser = argparse.ArgumentParser(description="BNU-Net against U-Net on generated images.")
    parser.add_argument("--quick", action="store_true", help="small images, few steps, one seed: under a minute")
    scale = QUICK if parser.parse_args().quick else FULL
    torch.set_num_threads(1)  # the ranks share the cores
    dist.init_process_group("gloo")
    try:
        runs = train_all(scale)
        if dist.get_rank() == 0:
            print(table(runs))
        dist.barrier()  # rank 0 evaluates alone
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
