"""What the processes of these tests run, and the same training in one process that holds all batches.

The single process uses torch's own batch norm and nothing of distnorm.

Shape legend: T step, W rank, N batch, C channel, S spatial dimensions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm.nn import SyncBatchNorm

LEARNING_RATE = 0.2
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class Net(nn.Module):
    """Two convolutions with norm, and a detour without norm that a rank may skip."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(6)
        self.detour = nn.Conv2d(6, 6, 1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x_NCS: Tensor, taken: Sequence[bool] = (True,)) -> Tensor:
        """``taken`` says for each of as many equal parts of the batch whether it takes the detour."""
        h_NCS = F.relu(self.norm1(self.conv1(x_NCS)))
        parts = h_NCS.chunk(len(taken))
        h_NCS = torch.cat([h + self.detour(h) if takes else h for h, takes in zip(parts, taken, strict=True)])
        h_NCS = F.relu(self.norm2(self.conv2(h_NCS)))
        return self.head(h_NCS.mean((2, 3)))


def net(dtype: torch.dtype = torch.float64) -> Net:
    """The same initial net on every rank, with an affine part that is not the identity."""
    torch.manual_seed(1)
    made = Net().to(dtype)
    for norm in (made.norm1, made.norm2):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    return made


def batches(steps: int, world_size: int, size: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs [T, W, N, 3, 6, 6] and labels [T, W, N]; ranks see different distributions."""
    generator = torch.Generator().manual_seed(2)
    x_TWNCS = torch.randn(steps, world_size, size, 3, 6, 6, generator=generator, dtype=torch.float64)
    offset_W = torch.arange(world_size, dtype=torch.float64).view(-1, 1, 1, 1, 1)
    labels_TWN = (x_TWNCS.mean((3, 4, 5)) > 0).long()
    return x_TWNCS * (1 + offset_W / 2) + offset_W, labels_TWN


class Trained(NamedTuple):
    """Outputs of every step [T, N, 2], gradients after the first, and the state: parameters and running statistics."""

    outputs: Tensor
    first_gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    running: dict[str, Tensor]
    united: dict[str, Tensor]  # running statistics after sync_running_stats, where that was asked for


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One training: which net on which data, for how long."""

    world_size: int
    steps: int = 4
    dtype: torch.dtype = torch.float64
    skips: bool = False
    wrapping: dict[str, Any] = field(default_factory=dict)
    unites: bool = False

    def data(self) -> tuple[Tensor, Tensor]:
        x_TWNCS, labels_TWN = batches(self.steps, self.world_size)
        return x_TWNCS.to(self.dtype), labels_TWN

    def taken(self, rank: int, step: int) -> bool:
        """Every rank but the first skips the detour in every other step."""
        return not (self.skips and rank > 0 and step % 2)


def converted(model: Net, recipe: str, options: dict[str, Any], wrapping: dict[str, Any]) -> nn.Module:
    """Convert, then wrap."""
    return DistributedDataParallel(distnorm.convert(model, recipe, **options), **wrapping)


def converted_late(model: Net, recipe: str, options: dict[str, Any], wrapping: dict[str, Any]) -> nn.Module:
    """Wrap, then convert."""
    return distnorm.convert(DistributedDataParallel(model, **wrapping), recipe, **options)


def dropped_in(model: Net, recipe: str, options: dict[str, Any], wrapping: dict[str, Any]) -> nn.Module:
    """As scripts do it with torch's layer."""
    return DistributedDataParallel(SyncBatchNorm.convert_sync_batchnorm(model), **wrapping)


def converted_twice(model: Net, recipe: str, options: dict[str, Any], wrapping: dict[str, Any]) -> nn.Module:
    """A model that holds torch's layers."""
    return converted(nn.SyncBatchNorm.convert_sync_batchnorm(model), recipe, options, wrapping)


Build = Callable[[Net, str, dict[str, Any], dict[str, Any]], nn.Module]


def train(rank: int, plan: Plan, recipe: str, options: dict[str, Any], build: Build = converted) -> Trained:
    """Train on this rank's part of the data, under DistributedDataParallel."""
    x_TWNCS, labels_TWN = plan.data()
    calls = [(x_TWNCS[step, rank], (plan.taken(rank, step),)) for step in range(plan.steps)]
    with without_wrapper_warnings():
        model = build(net(plan.dtype), recipe, options, dict(plan.wrapping))
        outputs, gradients = _steps(model, calls, labels_TWN[:, rank])
    running = running_statistics(model)
    if plan.unites:
        distnorm.sync_running_stats(model)
    return Trained(outputs, gradients, _parameters(model), running, running_statistics(model))


def train_joined(plan: Plan, group_size: int | None = None, every: int = 1) -> tuple[list[Tensor], Trained]:
    """The same in one process; outputs are also given per rank. Blocks of ``group_size`` ranks normalize together."""
    model = joined_net(plan.world_size, group_size or plan.world_size, every, plan.dtype)
    x_TWNCS, labels_TWN = plan.data()
    ranks = range(plan.world_size)
    calls = [(x_TWNCS[step].flatten(0, 1), [plan.taken(rank, step) for rank in ranks]) for step in range(plan.steps)]
    outputs, gradients = _steps(model, calls, labels_TWN.flatten(1, 2))
    running = {f"{name}.{key}": value for name in ("norm1", "norm2") for key, value in getattr(model, name).running()}
    trained = Trained(outputs, gradients, _parameters(model), running, {})
    return list(outputs.chunk(plan.world_size, dim=1)), trained


def joined_net(world_size: int, group_size: int, every: int, dtype: torch.dtype = torch.float64) -> Net:
    """The initial net, for the joined batch."""
    model = net(dtype)
    for name in ("norm1", "norm2"):
        setattr(model, name, Blocks(getattr(model, name), world_size, group_size, every))
    return model


class Blocks(nn.Module):
    """Stock batch norm of each block of ranks; in steps that are no multiple of ``every`` of each rank, untracked."""

    def __init__(self, stock: nn.BatchNorm2d, world_size: int, group_size: int, every: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(deepcopy(stock) for _ in range(world_size // group_size))
        for norm in self.norms:
            norm.weight, norm.bias = stock.weight, stock.bias
        self.world_size, self.every, self.step = world_size, every, 0

    def forward(self, x_NCS: Tensor) -> Tensor:
        shared, self.step = self.step % self.every == 0, self.step + 1
        if shared:
            return torch.cat([norm(x) for norm, x in zip(self.norms, x_NCS.chunk(len(self.norms)), strict=True)])
        weight, bias = self.norms[0].weight, self.norms[0].bias
        return torch.cat([F.batch_norm(x, None, None, weight, bias, True) for x in x_NCS.chunk(self.world_size)])

    def running(self) -> list[tuple[str, Tensor]]:
        """Running statistics, stacked over blocks."""
        return [(name, torch.stack([getattr(norm, name) for norm in self.norms])) for name in BUFFERS]


def _steps(
    model: nn.Module, calls: Sequence[tuple[Tensor, Sequence[bool]]], labels_TN: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.5)
    outputs, gradients = [], {}
    for (x_NCS, taken), labels_N in zip(calls, labels_TN, strict=True):
        optimizer.zero_grad()
        y_NC = model(x_NCS, taken)
        F.cross_entropy(y_NC, labels_N).backward()
        gradients = gradients or gradients_of(model)
        optimizer.step()
        outputs.append(y_NC.detach())
    return torch.stack(outputs), gradients


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies by name; zero where a parameter got none."""
    return {
        plain(name): torch.zeros_like(value) if value.grad is None else value.grad.clone()
        for name, value in model.named_parameters()
    }


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies by name."""
    return {plain(name): value.clone() for name, value in model.named_buffers()}


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {plain(name): value.detach().clone() for name, value in model.named_parameters()}


def plain(name: str) -> str:
    """A name without what wrappers add."""
    return name.removeprefix("module.").removeprefix("_orig_mod.").replace(".norms.0", "")


@contextmanager
def without_wrapper_warnings() -> Iterator[None]:
    """Silence DistributedDataParallel where the tests know better.

    A rank that skips nothing is told that it need not look for unused parameters; and ``broadcast_buffers`` is
    deprecated, but its successor is younger than the oldest torch that is supported.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
        yield


def penalty_of(model: nn.Module, x_NCS: Tensor) -> Tensor:
    """A loss on the outputs, and one on the slope of the outputs with respect to the inputs."""
    x_NCS = x_NCS.clone().requires_grad_()
    y_NC = model(x_NCS)
    (slope_NCS,) = torch.autograd.grad(y_NC.square().sum(), x_NCS, create_graph=True)
    return y_NC.square().sum(1).mean() + (slope_NCS.flatten(1).norm(dim=1) - 1).square().mean()
