"""Who takes part in ``gpu_check.py``: torch's norms, ours, and what makes a single rank use its collectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm

import distnorm
from distnorm import recipes
from distnorm.diagnostics.bench_steps import steady
from distnorm.policies import Facts, Local, Policy
from distnorm.policies.base import Reducer
from distnorm.recipe import Recipe
from distnorm.transport import Topology
from distnorm.transport.group import TorchGroup
from distnorm.types import Layout


class _OneOfTwo(Topology):
    """Of one rank, whose groups pass for groups of two: they would not send anything otherwise."""

    def _group(self, ranks: tuple[int, ...], background: bool = False) -> TorchGroup:
        group = TorchGroup(dist.group.WORLD, ranks, exchange_limit_bytes=-1)  # by all_reduce
        group.size = 2
        return group


@final
@dataclass(frozen=True, kw_only=True)
class Forced(Policy):
    """``policy`` in the job's own group, whose one rank issues every collective."""

    policy: Policy

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """As one of two ranks."""
        return self.policy.bind(_OneOfTwo(topology.ranks), layout)

    @property
    def facts(self) -> Facts:
        """Those of the policy."""
        return self.policy.facts


def forced(recipe: Recipe) -> Recipe:
    """``recipe``, with collectives of one rank."""
    return replace(recipe, policy=Forced(policy=recipe.policy), name=None)


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


def _by(recipe: Recipe, *, fuse: bool = False) -> Callable[[nn.Module], Any]:
    return lambda model: distnorm.convert(model, recipe, fuse=fuse)


SYNC = forced(recipes.sync_bn())
WINDOWED = steady(recipes.mabn())
Makers = dict[str, Callable[[nn.Module], Any]]
LAYERS: Makers = {
    "SyncBatchNorm": _with_torch_sync,
    "BatchNorm2d": lambda model: model,
    "local_bn": _by(recipes.local_bn()),
    "sync_bn": _by(SYNC),
}
STEPS: Makers = {
    **LAYERS,
    "local_bn, fused": _by(recipes.local_bn(), fuse=True),
    "sync_bn, fused": _by(SYNC, fuse=True),
    "mabn": _by(forced(WINDOWED)),
    "mabn, Local": _by(replace(WINDOWED, policy=Local(), name=None)),
}
RECIPES = {
    "sync_bn": SYNC,
    "local_bn": recipes.local_bn(),
    "mabn": forced(recipes.mabn(window=3, warmup=4)),
    "lazy_bn": forced(recipes.lazy_bn(warmup=3)),
}
"""With warm-ups that ten steps leave behind."""


def can_run(name: str, *, grouped: bool, card: bool) -> bool:
    """Whether this contender can: most need a group, and torch's SyncBatchNorm has no kernels for a CPU."""
    alone = name == "BatchNorm2d" or name.startswith("local_bn") or name.endswith("Local")
    return (grouped or alone) and (card or name != "SyncBatchNorm")


def at_hand(makers: Makers, *, grouped: bool, card: bool) -> Makers:
    """Those that can run."""
    return {name: make for name, make in makers.items() if can_run(name, grouped=grouped, card=card)}
