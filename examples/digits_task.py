"""The task of the digits example: a small residual network, and digits that each rank sees through its own scanner.

All scanners read the same kind of digits, but contrast and brightness differ from rank to rank, so the statistics of
one rank's images are not those of the whole job. There, normalization by the local batch alone goes wrong: it takes the
difference between scanners away in training and leaves it in evaluation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10
TRAIN_SAMPLES = 300  # of all ranks together
VALIDATION_SAMPLES = 500  # per scanner
WIDTH = 16
BLOCKS = 4

# How far distortions reach; ranges lie evenly around "unchanged".
ROTATION_RANGE = 0.15  # radians
SCALE_RANGE = 0.1
SHIFT_RANGE = 0.08  # of half an image


class Difficulty(NamedTuple):
    """How far apart the scanners are, evenly around "unchanged", and how much noise covers the images."""

    gain_range: float
    offset_range: float
    noise: float


DEMO = Difficulty(gain_range=0.5, offset_range=0.4, noise=0.1)


class Digits(NamedTuple):
    """Images ``[N, 1, 8, 8]`` and their labels ``[N]``."""

    images: Tensor
    labels: Tensor


class Scanner(NamedTuple):
    """The contrast and brightness with which a rank sees digits."""

    gain: float
    offset: float

    def scan(self, images: Tensor) -> Tensor:
        """Return ``images`` as this scanner delivers them."""
        return images * self.gain + self.offset


def seeded(seed: int) -> torch.Generator:
    """Return a new source of randomness that starts at ``seed``."""
    return torch.Generator().manual_seed(seed)


def scanner_of(rank: int, world_size: int, difficulty: Difficulty = DEMO) -> Scanner:
    """Return the scanner of ``rank``, between the darkest one at rank 0 and the brightest one at the last rank."""
    position = 2 * rank / (world_size - 1) - 1 if world_size > 1 else 0.0
    return Scanner(gain=1 + difficulty.gain_range * position, offset=difficulty.offset_range * position)


def split_digits(seed: int) -> tuple[Digits, Digits]:
    """Draw disjoint training and validation digits, standardized but not distorted yet."""
    bundle = load_digits()
    images = torch.as_tensor(bundle.images, dtype=torch.float32).unsqueeze(1)
    images = (images - images.mean()) / images.std()
    labels = torch.as_tensor(bundle.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=seeded(seed))
    train, validation = order[: TRAIN_SAMPLES + VALIDATION_SAMPLES].split([TRAIN_SAMPLES, VALIDATION_SAMPLES])
    return Digits(images[train], labels[train]), Digits(images[validation], labels[validation])


def distort(images: Tensor, generator: torch.Generator, difficulty: Difficulty = DEMO) -> Tensor:
    """Turn, scale and shift each image at random, and cover it with noise."""
    count = len(images)
    turn, grow, right, down = torch.rand(4, count, generator=generator) * 2 - 1
    angle, scale = ROTATION_RANGE * turn, 1 + SCALE_RANGE * grow
    cos, sin = scale * angle.cos(), scale * angle.sin()
    maps = torch.stack([cos, -sin, SHIFT_RANGE * right, sin, cos, SHIFT_RANGE * down], dim=1).view(count, 2, 3)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return moved + difficulty.noise * torch.randn(moved.shape, generator=generator)


def validation_views(clean: Digits, world_size: int, seed: int, difficulty: Difficulty = DEMO) -> Digits:
    """Return every digit of ``clean`` once through the scanner of each rank, distorted anew for each."""
    generator = seeded(seed)
    scanners = [scanner_of(rank, world_size, difficulty) for rank in range(world_size)]
    views = [scanner.scan(distort(clean.images, generator, difficulty)) for scanner in scanners]
    return Digits(torch.cat(views), clean.labels.repeat(world_size))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with stock batch norm, around a skip connection. Output has the shape of the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``x``."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(x + self.norm2(self.conv2(y)))


def build_network(seed: int, depth: int = BLOCKS, grid: int = 1) -> nn.Module:
    """Build the classifier with stock batch norm; equal seeds give equal weights.

    Args:
        seed: of the weights.
        depth: residual blocks, half of them before the images are halved.
        grid: features are averaged over ``grid`` x ``grid`` parts of the image.
    """
    torch.manual_seed(seed)
    blocks = [ResidualBlock(WIDTH) for _ in range(depth)]
    half = depth // 2
    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1, bias=False),
        nn.BatchNorm2d(WIDTH),
        nn.ReLU(),
        *blocks[:half],
        nn.MaxPool2d(2),
        *blocks[half:],
        nn.AdaptiveAvgPool2d(grid),
        nn.Flatten(),
        nn.Linear(WIDTH * grid**2, CLASSES),
    )
