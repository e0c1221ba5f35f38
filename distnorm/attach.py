"""A converted model in a training loop: its ranks, its optimizer, its state, its running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distnorm.layers import running_statistics, weights
from distnorm.layers.conversion import Conversion
from distnorm.layers.module import DistNorm


class Attachment:
    """Undoes what ``attach`` set up with an optimizer and a loss scale; the binding to ranks stays."""

    def __init__(self, conversions: list[Conversion], undo: list[Callable[[], None]]) -> None:
        """``undo`` takes the hooks off the optimizer."""
        self._conversions = conversions
        self._undo = undo

    def remove(self) -> None:
        """Steps end with backward passes again, and no loss scale is known."""
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
    """Bind the model's converted layers to their ranks now, and tell them of the training loop.

    Collective over ``process_group``, which is the data-parallel group where that is not the whole job (pipeline or
    tensor parallelism without a mesh); None binds to the ranks that ``convert`` implied. Exact recipes need no call.

    Args:
        model: has converted layers.
        process_group: the data-parallel ranks. Layers with a process group of their own keep to that.
        optimizer: its ``step`` ends a step of moving statistics, instead of every backward pass: for gradient
            accumulation, several losses, GANs. One more call with another optimizer adds that one. With SGD,
            centralized weights take a cheaper form.
        loss_scale: gives the factor that the loss is multiplied by, such as ``scaler.get_scale``.
        manual: steps end where you call ``end_step(model)``, and nowhere else.

    Raises:
        RuntimeError: ranks converted different models or recipes, or do not answer within the job's timeout.
        ValueError: the recipe does not fit the ranks, or the model has no converted layer; optimizer and manual.
    """
    if manual and optimizer is not None:
        raise ValueError("attach(optimizer=..., manual=True): either the optimizer ends steps, or you do.")
    conversions = conversions_of(model)
    undo = []
    for conversion in conversions:
        conversion.bind(process_group)  # all of them, before anything is said of steps: a bind may be refused
    for conversion in conversions:
        conversion.ends_with_backward = optimizer is None and not manual
        conversion.loss_scale = loss_scale
        if optimizer is not None:
            undo.append(_end_steps(conversion, optimizer))
    projection = None if optimizer is None else weights.project_with(model, optimizer)
    return Attachment(conversions, undo if projection is None else [*undo, projection])


# docs/decisions.md#attaching-twice
def _end_steps(conversion: Conversion, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Let ``optimizer`` end the steps of ``conversion``, once each, however often it is told so."""
    known = conversion.optimizers.get(optimizer)
    handle = optimizer.register_step_post_hook(lambda *_: conversion.bound().end_step())
    conversion.optimizers[optimizer] = handle
    if known is not None:
        known.remove()
    return handle.remove


def end_step(model: nn.Module) -> None:
    """End a step of moving statistics by hand: all ranks alike. One asynchronous collective starts.

    Raises:
        ValueError: the model has no converted layer.
        RuntimeError: another rank did not take part in the last step within the timeout.
    """
    for conversion in conversions_of(model):
        conversion.bound().end_step()


def state_dict(model: nn.Module) -> list[dict[str, Any]]:
    """What moving statistics need to resume as if nothing had happened; save it per rank, beside the model's.

    Waits for what is in flight; the trajectory goes on unchanged. Exact recipes have little to save: their step.

    Raises:
        ValueError: the model has no converted layer.
    """
    return [conversion.state_dict() for conversion in conversions_of(model)]


def load_state_dict(model: nn.Module, state: list[dict[str, Any]]) -> None:
    """Resume from ``state_dict``. No collective.

    With this rank's own state and the same number of ranks the trajectory goes on bit for bit; with another rank's, or
    at another world size, windows start warm and a log line says so. A window of another size takes over the newest
    entries that there are and fit.

    Raises:
        ValueError: as ``check_state_dict``; nothing has changed then.
    """
    check_state_dict(model, state)
    conversions = conversions_of(model)
    for conversion, each in zip(conversions, state, strict=True):
        conversion.load_state_dict(each)
    weights.goes_on(model)


def check_state_dict(model: nn.Module, state: object) -> None:
    """Whether ``load_state_dict`` can take ``state``. No collective; nothing changes.

    Raises:
        ValueError: it is no ``state_dict``, or of a newer version, another recipe than one that differs in its window
            or warm-up, other layers or another number of conversions; the message says which.
    """
    conversions = conversions_of(model)
    if not isinstance(state, list) or len(state) != len(conversions):
        given = f"{len(state)} conversions" if isinstance(state, list) else f"another kind, a {type(state).__name__},"
        raise ValueError(f"distnorm: state of {given} given; the model has {len(conversions)}.")
    for conversion, each in zip(conversions, state, strict=True):
        conversion.check_state(each)


def sync_running_stats(model: nn.Module) -> None:
    """Unite running statistics that ranks keep each for themselves (``local_bn``, ``group_bn``), in place.

    mean = average of the ranks' means; var = average of var + mean^2, less mean^2. One collective over the
    data-parallel ranks; call it on all of them, before evaluating or saving. None where they agree already.

    Raises:
        ValueError: the model has no converted layer.
    """
    for conversion in conversions_of(model):
        binding = conversion.bound()
        if not binding.agrees:
            running_statistics.average((layer for _, layer in conversion.layers()), binding.topology.everyone())


def conversions_of(model: nn.Module) -> list[Conversion]:
    """The conversions of ``model``, in the order of its layers."""
    found = {
        id(layer._site.conversion): layer._site.conversion for layer in model.modules() if isinstance(layer, DistNorm)
    }
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer that distnorm converted; call distnorm.convert first.")
    return list(found.values())
