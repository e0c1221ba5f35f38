"""What the tests of FSDP2 train: a model whose shards are uneven and empty, its batches, its reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import distnorm

N = 4
"""Samples per rank and step."""
LR = 0.1
MABN: dict[str, Any] = {"window": 3, "warmup": 3}


class Net(nn.Module):
    """5 channels and 1 channel: shards of 3 and 2 rows, and of 1 row and none."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(5, 1, 3, padding=1), nn.BatchNorm2d(1), nn.ReLU())
        self.head = nn.Linear(36, 2)
        self.recompute = recompute

    def forward(self, x_NCS: Tensor) -> Tensor:
        h_NCS = self.stem(x_NCS)
        h_NCS = checkpoint(self.block, h_NCS, use_reentrant=False) if self.recompute else self.block(h_NCS)
        return self.head(h_NCS.flatten(1))


def net(dtype: torch.dtype = torch.float64, recompute: bool = False) -> Net:
    torch.manual_seed(1)
    return Net(recompute).to(dtype)


def batch(step: int, ranks: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The joined batch; ranks see different distributions."""
    generator = torch.Generator().manual_seed(step)
    x_NCS = torch.randn(ranks * N, 3, 6, 6, generator=generator, dtype=dtype)
    x_NCS += torch.arange(ranks).repeat_interleave(N).view(-1, 1, 1, 1)
    return x_NCS, torch.randint(0, 2, (ranks * N,), generator=generator)


def train(
    model: nn.Module,
    steps: Sequence[int],
    ranks: int,
    place: int | None,
    *,
    attached: bool = False,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """Train on the part of the rank at ``place``, or on the joined batch."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    if attached:
        distnorm.attach(model, optimizer=optimizer)
    losses = []
    for step in steps:
        x_NCS, labels_N = batch(step, ranks, next(model.buffers()).dtype)
        if place is not None:
            x_NCS, labels_N = x_NCS[place * N :][:N], labels_N[place * N :][:N]
        loss = F.cross_entropy(model(x_NCS).to(x_NCS.dtype), labels_N)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The state of a sharded model, gathered on every rank."""
    return {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in get_model_state_dict(model).items()
    }


def shard(model: Net, parts: str = "blocks", **options: Any) -> Net:
    """Shard ``model``, its blocks first; with ``parts="leaves"`` every convolution and norm before them."""
    if parts == "leaves":
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
                fsdp.fully_shard(module, **options)
    fsdp.fully_shard(model.block, **options)
    fsdp.fully_shard(model, **options)
    return model


def joined(steps: int, ranks: int) -> dict[str, Tensor]:
    reference = net()
    train(reference, range(steps), ranks, None)
    return reference.state_dict()
