"""One training step under DDP, timed: what the benchmarks let take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm.layers.module import DistNorm

RATE = 1e-3


def stepper(model: nn.Module, shape: Sequence[int], optimizer_ends: bool = True) -> Callable[[], float]:
    """A function that takes one training step and returns its milliseconds, from when all ranks are ready to go.

    Args:
        model: classifies; converted layers are attached to their ranks. Collective.
        shape: of the input, each rank's own.
        optimizer_ends: whether steps of moving statistics end with SGD's, and centralized weights take the projected
            form; else with the backward pass, and they take the forward form.
    """
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9)
    if any(isinstance(each, DistNorm) for each in model.modules()):
        distnorm.attach(model, optimizer=optimizer if optimizer_ends else None)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(dist.get_rank()))
    labels = torch.arange(len(x)) % 10

    def step() -> float:
        dist.barrier()
        started = time.perf_counter()
        optimizer.zero_grad()
        functional.cross_entropy(wrapped(x), labels).backward()
        optimizer.step()
        return (time.perf_counter() - started) * 1e3

    return step
