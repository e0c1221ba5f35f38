"""Keep centred weights centred in place: hooks around the steps of every optimizer of this process.

No optimizer has to be named: torch calls these hooks for all of them, also those that frameworks wrap.
"""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_alive: dict[int, ReferenceType[Any]] = {}
"""The layers of this process with centred weights, for the hook on optimizers, which may step any of them."""


# docs/decisions.md#optimizers-that-step-flat-copies
def note(layer: Any) -> None:
    """Keep the weight of ``layer``, a ``Centralized``, centred from now on, as long as the layer lives."""
    _watch_optimizers()
    key = id(layer)
    _alive[key] = ref(layer, lambda _: _alive.pop(key, None))


def forget(layer: Any) -> None:
    """Undo ``note``."""
    _alive.pop(id(layer), None)


@cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Step from centred weights the first time too, so that it makes no difference whether they were saved before."""
    for layer in _stepped_by(optimizer):
        if not layer.kept:
            layer.project()


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for layer in _stepped_by(optimizer):
        layer.kept = layer.project()
        layer._conversion.feeders.known = True


def _stepped_by(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Layers that train and whose weights ``optimizer`` has, in its order: sharded weights may need collectives."""
    holders: dict[int, Any] = {}
    for reference in list(_alive.values()):
        layer = reference()
        if layer is not None and (layer.kept or layer.has_trained()):
            holders[id(layer._parameters.get("weight"))] = layer
    if not holders:
        return []
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return [holders[id(parameter)] for parameter in parameters if id(parameter) in holders]
