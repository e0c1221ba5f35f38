"""What the Lightning jobs train on, and the same for a reference that knows neither Lightning nor distnorm."""

import torch
from torch import nn

STEPS, LOCAL = 20, 3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def joined_batches(world_size, steps=STEPS):
    """Every step's samples of all ranks; each rank has a distribution of its own."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(steps, world_size, LOCAL, 1, 6, 6, generator=generator)
    images += torch.arange(world_size).view(1, -1, 1, 1, 1, 1)
    return images, torch.randint(3, (steps, world_size, LOCAL), generator=generator)


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)
