"""Centre weights in place around the steps of every optimizer of this process.

torch calls these hooks for all optimizers, also for those that frameworks wrap, so none has to be given.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_alive: dict[int, ReferenceType[Any]] = {}
"""The layers of this process with centralized weights; any optimizer may step any of them."""


# docs/decisions.md#optimizers-that-step-flat-copies
def register(layer: Any) -> None:
    """Keep the weight of ``layer``, a ``Centralized``, centred from now on, without keeping the layer alive."""
    _register_hooks()
    key = id(layer)
    _alive[key] = ref(layer, lambda _: _alive.pop(key, None))


def unregister(layer: Any) -> None:
    """Undo ``register``."""
    _alive.pop(id(layer), None)


@cache
def _register_hooks() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Centre weights before the first step too, so that saving the model before that step makes no difference."""
    for layer in _stepped_by(optimizer):
        if not layer.kept:
            layer.project()


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for layer in _stepped_by(optimizer):
        layer.kept = layer.project()
        layer._conversion.feeders.known = True


def _stepped_by(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the layers in training whose weights ``optimizer`` holds, in its order.

    The order is the same on all ranks, since centring sharded weights may need collectives.
    """
    holders: dict[int, Any] = {}
    for reference in list(_alive.values()):
        layer = reference()
        if layer is not None and (layer.kept or layer.has_trained()):
            holders[id(layer._parameters.get("weight"))] = layer
    if not holders:
        return []
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [holders[id(parameter)] for parameter in parameters if id(parameter) in holders]
