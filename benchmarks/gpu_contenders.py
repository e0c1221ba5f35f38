"""Who takes part in ``gpu.py``: torch's norms, ours, and what makes a single rank use its collectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch.distributed as dist
from models import resnet50
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm

import distnorm
from distnorm import recipes
from distnorm.diagnostics.bench_steps import steady
from distnorm.grid import Recipe
from distnorm.methods import BatchNorm
from distnorm.policies import Facts, Local, Policy
from distnorm.policies.base import Reducer
from distnorm.transport import Topology
from distnorm.transport.group import TorchGroup
from distnorm.types import Layout, Slot


class _Sum(Reducer):
    def __init__(self, group: TorchGroup) -> None:
        super().__init__(group.size)
        self.group = group

    def reduce(self, wire: Tensor, slot: Slot) -> Tensor:
        return self.group.sum(wire, slot)

    def start(self, wire: Tensor, slot: Slot) -> Callable[[], Tensor]:
        return self.group.start(wire, slot).wait


@final
@dataclass(frozen=True, kw_only=True)
class ForcedAllReduce(Policy):
    """``AllReduce`` whose group passes for one of two ranks: it would not send anything otherwise."""

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """The job's own group."""
        group = TorchGroup(dist.group.WORLD, (0,), exchange_limit_bytes=-1)  # by all_reduce
        group.size = 2
        return _Sum(group)

    @property
    def facts(self) -> Facts:
        """One collective."""
        return Facts(collectives=1.0)


class TorchSync(nn.BatchNorm2d):
    """Torch's SyncBatchNorm by its Function, as the module falls back to local statistics on one rank."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        buffers = self.running_mean, self.running_var
        y: Tensor = SyncBatchNorm.apply(
            input, self.weight, self.bias, *buffers, self.eps, self.momentum, dist.group.WORLD, 1
        )
        return y


def _with_torch_sync(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = TorchSync
    return model


SYNC = Recipe(method=BatchNorm(), policy=ForcedAllReduce())
MAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "SyncBatchNorm": _with_torch_sync,
    "BatchNorm2d": lambda model: model,
    "local_bn": lambda model: distnorm.convert(model, "local_bn"),
    "sync_bn": lambda model: distnorm.convert(model, SYNC),
}
FUSED: dict[str, Callable[[nn.Module], Any]] = {
    "local_bn, fused": lambda model: distnorm.convert(model, "local_bn", fuse=True),
    "sync_bn, fused": lambda model: distnorm.convert(model, SYNC, fuse=True),
}
MOVING: dict[str, Callable[[nn.Module], Any]] = {
    "mabn": lambda model: distnorm.convert(model, steady(recipes.mabn())),
    "mabn, Local": lambda model: distnorm.convert(model, replace(recipes.mabn(), policy=Local(), name=None)),
}


def layers(channels: int) -> dict[str, nn.Module]:
    """One norm layer of each contender."""
    return {name: make(nn.Sequential(nn.BatchNorm2d(channels)).cuda())[0] for name, make in MAKERS.items()}


def resnets(width: int) -> dict[str, nn.Module]:
    """A ResNet-50 of each contender, equal weights."""
    return {name: make(resnet50(width).cuda()) for name, make in (MAKERS | FUSED | MOVING).items()}
