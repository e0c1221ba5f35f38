"""Connect a converted model to its training loop: ranks, optimizer, loss scale, saved state, running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distnorm.layers import running_statistics, untrained, weights
from distnorm.layers.conversion import Conversion
from distnorm.layers.module import DistNorm


class Attachment:
    """Handle of one ``attach`` call: disconnects the optimizer and the loss scale. Layers stay bound to their ranks."""

    def __init__(self, conversions: list[Conversion], undo: list[Callable[[], None]]) -> None:
        """``undo`` removes the hooks from the optimizer."""
        self._conversions = conversions
        self._undo = undo

    def remove(self) -> None:
        """Let backward passes end steps again, and drop the loss scale."""
        for conversion in self._conversions:
            conversion.ends_with_backward = True
            conversion.loss_scale = None
        for undo in self._undo:
            undo()


def attach(
    model: nn.Module,
    *,
    process_group: dist.ProcessGroup | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    loss_scale: Callable[[], Tensor | float] | None = None,
    manual: bool = False,
) -> Attachment:
    """Bind the model's converted layers to their ranks now, and connect them to the training loop.

    Collective over ``process_group``. Exact recipes need no call.

    Args:
        model: a model with converted layers.
        process_group: the data-parallel ranks, if they are not the whole job (pipeline or tensor parallelism without
            a mesh). None binds to the ranks that ``convert`` implied. Layers that have a process group use that one.
        optimizer: its ``step`` ends a step of moving statistics, instead of every backward pass. Needed for gradient
            accumulation, several losses and GANs. Another call with another optimizer adds that one. With SGD,
            centralized weights use a cheaper form. Parameters that ``convert`` has added after the optimizer was built
            join the group of their layer's weight.
        loss_scale: returns the factor by which the loss is multiplied, such as ``scaler.get_scale``.
        manual: only ``end_step(model)`` ends a step.

    Raises:
        RuntimeError: ranks converted different models or recipes, or do not answer within the job's timeout.
        ValueError: the recipe does not fit the ranks, the model has no converted layer, both ``optimizer`` and
            ``manual`` are given, or the environment has an unknown variable ``DISTNORM_*``.
    """
    if manual and optimizer is not None:
        raise ValueError(
            "attach(optimizer=..., manual=True): either the optimizer ends steps or end_step does. Give one of the two."
        )
    conversions = conversions_of(model)
    undo = []
    for conversion in conversions:
        conversion.bind(process_group)  # bind all before changing any: a bind may raise
    for conversion in conversions:
        conversion.ends_with_backward = optimizer is None and not manual
        conversion.loss_scale = loss_scale
        if optimizer is not None:
            undo.append(_end_steps(conversion, optimizer))
    if optimizer is not None:
        untrained.adopt(model, optimizer.param_groups)
    projection = None if optimizer is None else weights.project_with(model, optimizer)
    return Attachment(conversions, undo if projection is None else [*undo, projection])


# docs/decisions.md#attaching-twice
def _end_steps(conversion: Conversion, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Let ``optimizer`` end the steps of ``conversion``, once per optimizer step, even if attached repeatedly."""
    known = conversion.optimizers.get(optimizer)
    handle = optimizer.register_step_post_hook(lambda *_: conversion.bound().end_step())
    conversion.optimizers[optimizer] = handle
    if known is not None:
        known.remove()
    return handle.remove


def end_step(model: nn.Module) -> None:
    """End a step of moving statistics by hand. Call it on all ranks: it starts one asynchronous collective.

    Raises:
        ValueError: the model has no converted layer.
        RuntimeError: another rank did not take part in the last step within the timeout.
    """
    for conversion in conversions_of(model):
        conversion.bound().end_step()


def state_dict(model: nn.Module) -> list[dict[str, Any]]:
    """Return this rank's state of moving statistics. Save it per rank, beside the model's state_dict.

    A run that loads it continues bit for bit. Waits for the collective in flight, which does not change training.
    Exact recipes save little more than their step.

    Raises:
        ValueError: the model has no converted layer.
    """
    return [conversion.state_dict() for conversion in conversions_of(model)]


def load_state_dict(model: nn.Module, state: list[dict[str, Any]]) -> None:
    """Resume from ``state_dict``. Issues no collective.

    With this rank's own state and the same world size, training continues bit for bit. With the state of another rank
    or world size, windows start warm, and a log line says so. A window of another size takes over the newest entries.

    Raises:
        ValueError: as ``check_state_dict``; the model is unchanged.
    """
    check_state_dict(model, state)
    conversions = conversions_of(model)
    for conversion, each in zip(conversions, state, strict=True):
        conversion.load_state_dict(each)
    weights.mark_trained(model)


def check_state_dict(model: nn.Module, state: object) -> None:
    """Raise unless ``load_state_dict`` can load ``state``. Issues no collective and changes nothing.

    Raises:
        ValueError: it is not a ``state_dict``, or it has a newer version, another recipe (its window and warm-up may
            differ), other layers or another number of conversions. The message names the difference.
    """
    conversions = conversions_of(model)
    if not isinstance(state, list) or len(state) != len(conversions):
        given = f"{len(state)} states" if isinstance(state, list) else f"a {type(state).__name__}"
        raise ValueError(
            f"distnorm: need a list of one state per conversion of the model, {len(conversions)} in all, as "
            f"distnorm.state_dict returns it; got {given}."
        )
    for conversion, each in zip(conversions, state, strict=True):
        conversion.check_state(each)


def sync_running_stats(model: nn.Module) -> None:
    """Average running statistics that differ between ranks (``local_bn``, ``group_bn``), in place.

    mean = average of the ranks' means; var = average of var + mean^2, less mean^2. Issues one collective over the
    data-parallel ranks, or none if the recipe keeps them equal. Call it on all ranks, before evaluating or saving.

    Raises:
        ValueError: the model has no converted layer.
    """
    for conversion in conversions_of(model):
        binding = conversion.bound()
        if not binding.agrees:
            running_statistics.average((layer for _, layer in conversion.layers()), binding.topology.everyone())


def conversions_of(model: nn.Module) -> list[Conversion]:
    """Return the conversions of ``model``, in the order of its layers.

    Raises:
        ValueError: the model has no converted layer.
    """
    conversions = {
        id(layer._site.conversion): layer._site.conversion for layer in model.modules() if isinstance(layer, DistNorm)
    }
    if not conversions:
        raise ValueError(f"{type(model).__name__} has no converted layer; call distnorm.convert first.")
    return list(conversions.values())


def is_converted_by_call(model: nn.Module) -> bool:
    """Return whether ``convert`` was called for parts of ``model``. Constructors in ``distnorm.nn`` do not count."""
    return any(isinstance(each, DistNorm) and not each._site.conversion.is_provisional for each in model.modules())
