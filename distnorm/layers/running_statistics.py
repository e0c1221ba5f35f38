"""Running statistics of layers, and how they become equal on all ranks.

Every function changes buffers in place, since engines hold references to them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.compat.uninterrupted import Call
from distnorm.kernels.running import updating_running
from distnorm.methods import Method
from distnorm.transport import Group
from distnorm.types import GlobalStatistics, Running, Slot

logger = logging.getLogger("distnorm")

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def updating(layers: Mapping[str, _BatchNorm], statistics: Iterable[GlobalStatistics], method: Method) -> list[Call]:
    """Return the calls that update those of ``layers`` that track, guarded, as windows are."""
    calls: dict[str, list[list[Call]]] = {}
    for each in statistics:
        layer = layers.get(each.layer)
        if layer is not None and layer.track_running_stats:
            earlier = calls.setdefault(each.layer, [])
            running = running_of(layer, guarded=True)
            others = sum(map(bool, earlier))
            earlier.append(updating_running(running, each, method, layer.num_features, others=others))
    return [call for of_layer in calls.values() for each in of_layer for call in each]


def running_of(layer: _BatchNorm, guarded: bool = False) -> Running:
    """Return the running statistics of a layer, read from its dictionary, which is faster than module attributes."""
    buffers = layer._buffers
    if "running_mean" in buffers and "running_var" in buffers and "num_batches_tracked" in buffers:
        found = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    else:
        found = layer.running_mean, layer.running_var, layer.num_batches_tracked
    return Running(*found, layer.momentum, guarded)


@torch.no_grad()
def fold_means(layers: Iterable[_BatchNorm]) -> None:
    """Convert stock running statistics to those of a method without centring: var + mean^2 about a mean of 0.

    Stock running statistics are used unchanged in evaluation until training continues. From then on they must hold what
    the method tracks.
    """
    folded = 0
    for layer in layers:
        mean_C = layer.running_mean
        if mean_C is not None and layer.running_var is not None and not mean_C.is_meta and bool(mean_C.any()):
            layer.running_var.add_(mean_C.square())
            mean_C.zero_()
            folded += 1
    if folded:
        logger.info("running statistics of %d layers: running_var += running_mean^2, running_mean = 0", folded)


# docs/decisions.md#running-statistics-at-binding
@torch.no_grad()
def take_over(layers: Iterable[_BatchNorm], group: Group) -> None:
    """Overwrite the running statistics of every rank of ``group`` with its first rank's. One broadcast per dtype.

    Equal values are not written: a frozen layer that ran before may have saved its buffers for backward.
    """
    if group.size == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in _buffers(layers):
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        device = buffers[0].device  # if layers are on several devices, all statistics are sent from the first layer's
        flat = torch.cat([buffer.flatten().to(device) for buffer in buffers])
        group.broadcast(flat)
        for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            values = values.view_as(buffer).to(buffer.device)
            if not torch.equal(buffer, values):
                buffer.copy_(values)


@torch.no_grad()
def average(layers: Iterable[_BatchNorm], group: Group) -> None:
    """Average running statistics over all ranks: the means of mean and of var + mean^2. One collective."""
    tracked = [
        (layer.running_mean, layer.running_var)
        for layer in layers
        if layer.running_mean is not None and layer.running_var is not None
    ]
    if not tracked or group.size == 1:
        return
    payload = torch.cat([torch.cat((mean_C, var_C + mean_C.double().square())) for mean_C, var_C in tracked]).double()
    shared = group.sum(payload, Slot("running statistics", "forward", 0)) / group.size
    sizes = [mean_C.numel() for mean_C, _ in tracked]
    for (mean_C, var_C), both in zip(tracked, shared.split([2 * size for size in sizes]), strict=True):
        new_mean_C, square_C = both.view(2, -1)
        mean_C.copy_(new_mean_C)
        var_C.copy_((square_C - new_mean_C.square()).clamp_min(0))


def snapshot(layers: Iterable[tuple[str, _BatchNorm]]) -> dict[str, list[Tensor]]:
    """Return copies of running statistics, by layer."""
    return {name: [buffer.detach().clone() for buffer in _buffers([layer])] for name, layer in layers}


@torch.no_grad()
def restore(layers: Iterable[tuple[str, _BatchNorm]], saved: Mapping[str, list[Tensor]]) -> None:
    """Restore what ``snapshot`` copied; layers that it does not contain are not changed."""
    for name, layer in layers:
        for buffer, values in zip(_buffers([layer]), saved.get(name, ()), strict=False):
            buffer.copy_(values)


def _buffers(layers: Iterable[_BatchNorm]) -> Iterator[Tensor]:
    for layer in layers:
        for name in BUFFERS:
            buffer = getattr(layer, name)
            if buffer is not None:
                yield buffer
