"""Parameters that a conversion has added, and an optimizer that was built before.

Layers that have some name them in ``_added_parameters``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_watched: WeakSet[nn.Module] = WeakSet()
"""Layers with added parameters whose weight or bias no optimizer has stepped yet."""


def added_parameters(layer: nn.Module) -> Mapping[str, Parameter]:
    """Return what a conversion has added to ``layer``, by the name in its model."""
    listed = getattr(layer, "_added_parameters", None)
    found: Mapping[str, Parameter] = {} if listed is None else listed()
    return found


def groups_of(optimizer: object, parameters: object) -> list[dict[str, Any]]:
    """Return the groups of an ``optimizer``, or of a list of ``parameters`` or groups for one, to be added to in place.

    An iterator such as ``model.parameters()`` gives none: who reads it later finds what a conversion has added.
    """
    if isinstance(optimizer, Optimizer):
        return optimizer.param_groups
    if not isinstance(parameters, list) or not parameters:
        return []
    if not isinstance(parameters[0], dict):
        return [{"params": parameters}]
    return [group for group in parameters if isinstance(group["params"], list)]


def adopt(model: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
    """Add parameters that a conversion added to ``model``, and that ``groups`` lack, to the group of their layer.

    That is the group of the layer's weight or bias, or the first one if it has neither. A layer whose weight or bias
    is in none, but in another optimizer, is left alone.
    """
    if not groups:
        return
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    for layer in model.modules():
        own = list(_own(layer))
        found = [group_of[id(each)] for each in own if id(each) in group_of]
        if own and not found:
            continue
        group = found[0] if found else groups[0]
        for name, parameter in added_parameters(layer).items():
            if id(parameter) not in group_of:
                group["params"].append(parameter)
                if "param_names" in group:
                    group["param_names"].append(name)


def watch(layer: nn.Module) -> None:
    """Warn at the first step of an optimizer that has the weight or bias of ``layer``, but not what was added."""
    _register_hook()
    _watched.add(layer)


@cache
def _register_hook() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    if not _watched:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    layers = [layer for layer in _watched if any(id(each) in stepped for each in _own(layer))]
    missing = []
    for layer in layers:
        _watched.discard(layer)
        missing += [name for name, parameter in added_parameters(layer).items() if id(parameter) not in stepped]
    if missing:
        warnings.warn(
            f"{type(optimizer).__name__} does not train {', '.join(sorted(missing))}, which distnorm.convert added "
            "after it was built. Build the optimizer after convert, or call distnorm.attach(model, optimizer=...).",
            stacklevel=2,
        )


def _own(layer: nn.Module) -> Iterator[Parameter]:
    for name in ("weight", "bias"):
        parameter = layer._parameters.get(name)
        if parameter is not None:
            yield parameter
