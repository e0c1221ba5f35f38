"""The parameters and buffers that a method declares: registered on its layers, reset, and absent from checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.layers.layout import Measured, measure
from distnorm.layers.site import Site
from distnorm.layers.untrained import watch
from distnorm.methods import ChannelAffine, Method
from distnorm.methods.base import compute_dtype

logger = logging.getLogger("distnorm")


def measured(name: str, layer: _BatchNorm, method: Method) -> Measured | None:
    """Return what ``method`` shares and declares in ``layer``; None if it is affine per channel.

    Raises:
        ValueError: it cannot normalize this layer; the message begins with ``name``.
    """
    if isinstance(method, ChannelAffine):
        return None
    try:
        method.check(layer.num_features)
        found = measure(method, layer.num_features)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    _check(name, layer, found)
    return found


def _check(name: str, layer: _BatchNorm, measured: Measured) -> None:
    """Raise a ValueError if ``layer``, of this ``name``, has attributes that ``measured`` declares."""
    site: Site | None = getattr(layer, "_site", None)
    earlier = () if site is None else (*site.parameters, *site.buffers)  # of a conversion that this one replaces
    for own in (*measured.declared.parameters, *measured.declared.buffers):
        if hasattr(layer, own) and own not in earlier:
            raise ValueError(
                f"{name}: {type(layer).__name__} has an attribute {own!r} already; the method declares one."
            )


def register(layer: _BatchNorm, measured: Measured) -> None:
    """Register on ``layer`` what is ``measured`` to be declared, on its device, parameters in its dtype."""
    there = (*layer.parameters(), *(each for each in layer.buffers() if each.is_floating_point()))
    like = there[0] if there else None
    for name, value in measured.declared.parameters.items():
        layer.register_parameter(name, nn.Parameter(_as(value, like)))
        watch(layer)
    for name, value in measured.declared.buffers.items():
        layer.register_buffer(name, _as(value, like, wide=True))


def remove(layer: _BatchNorm, site: Site) -> None:
    """Remove what ``register`` has registered."""
    for name in (*site.parameters, *site.buffers):
        delattr(layer, name)


@torch.no_grad()
def reset(layer: _BatchNorm, site: Site, names: Collection[str]) -> None:
    """Set the parameters and buffers of these ``names`` to their initial values, in place."""
    for name, value in _initial(site).items():
        if name in names:
            getattr(layer, name).copy_(value)


def complete(layer: _BatchNorm, site: Site, state_dict: dict[str, Any], prefix: str) -> None:
    """Add initial values to ``state_dict`` if it has none of what is declared, as a checkpoint of a stock layer."""
    names = (*site.parameters, *site.buffers)
    if not names or (f"{prefix}running_mean" not in state_dict and f"{prefix}weight" not in state_dict):
        return
    if any(f"{prefix}{name}" in state_dict for name in names):
        return
    for name, value in _initial(site).items():
        state_dict[f"{prefix}{name}"] = _as(value, getattr(layer, name), wide=name in site.buffers)
    if not site.conversion.told_of_initial_values:
        site.conversion.told_of_initial_values = True
        logger.info("distnorm: the checkpoint has no %s, as of stock layers; they start anew", ", ".join(names))


def _initial(site: Site) -> dict[str, Tensor]:
    return {} if site.measured is None else {**site.measured.declared.parameters, **site.measured.declared.buffers}


def _as(value: Tensor, like: Tensor | None, *, wide: bool = False) -> Tensor:
    """Return a copy of ``value`` on the device of ``like``, and in its dtype if it is floating point."""
    if like is None:
        return value.clone()
    dtype = compute_dtype(like.dtype) if wide else like.dtype
    return value.detach().to(like.device, dtype if value.is_floating_point() else value.dtype, copy=True)
