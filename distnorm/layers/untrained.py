"""Parameters that a method has declared, and an optimizer that was built before the model was converted."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

_watched: WeakSet[nn.Module] = WeakSet()
"""Layers with declared parameters whose weight or bias no optimizer has stepped yet."""


def adopt(layer: nn.Module, optimizer: Optimizer) -> None:
    """Add the declared parameters of ``layer`` that are in no group of ``optimizer`` to that of its weight or bias.

    A layer without these joins the first group. One whose weight or bias another optimizer has is left alone.
    """
    site: Any = getattr(layer, "_site")  # noqa: B009, every converted layer has one
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    own = list(_own(layer))
    groups = [group_of[id(each)] for each in own if id(each) in group_of]
    if own and not groups:
        return
    group = groups[0] if groups else optimizer.param_groups[0]
    for name in site.parameters:
        parameter = getattr(layer, name)
        if id(parameter) not in group_of:
            group["params"].append(parameter)
            if "param_names" in group:
                group["param_names"].append(f"{site.name}.{name}")


def watch(layer: nn.Module) -> None:
    """Warn at the first step of an optimizer that has the weight or bias of ``layer``, but not what is declared."""
    _register_hook()
    _watched.add(layer)


@cache
def _register_hook() -> None:
    register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, *_: Any) -> None:
    if not _watched:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    stepped = [layer for layer in _watched if any(id(each) in held for each in _own(layer))]
    missing = []
    for layer in stepped:
        _watched.discard(layer)
        site: Any = getattr(layer, "_site", None)
        names = () if site is None else site.parameters
        missing += [f"{site.name}.{name}" for name in names if id(getattr(layer, name)) not in held]
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
