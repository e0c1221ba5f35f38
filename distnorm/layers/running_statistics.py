"""Running statistics of layers, and how they become equal on all ranks.

Every function changes buffers in place, since engines hold references to them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.compat.uninterrupted import Call, uninterrupted
from distnorm.kernels import running as kernels
from distnorm.layers.layout import measure
from distnorm.methods import ChannelAffine, Layer, Method
from distnorm.transport import Group
from distnorm.types import GlobalStatistics, Running, Slot

logger = logging.getLogger("distnorm")

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def buffers_of(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the running statistics of ``layer``, and of the buffers that its method has declared."""
    site = getattr(layer, "_site", None)
    return BUFFERS if site is None else (*BUFFERS, *site.buffers)


def updating(layers: Mapping[str, _BatchNorm], statistics: Iterable[GlobalStatistics], method: Method) -> list[Call]:
    """Return calls that update those of ``layers`` that track with all ``statistics``; guarded, as windows are."""
    calls: list[Call] = []
    for name, of_layer in by_layer(statistics).items():
        layer = layers.get(name)
        if layer is not None and layer.track_running_stats:
            calls += _updating(layer, running_of(layer, guarded=True), of_layer, method)
    return calls


def by_layer(statistics: Iterable[GlobalStatistics]) -> dict[str, list[GlobalStatistics]]:
    """Return the ``statistics`` of each layer, in order."""
    found: dict[str, list[GlobalStatistics]] = {}
    for each in statistics:
        found.setdefault(each.layer, []).append(each)
    return found


def _updating(layer: _BatchNorm, running: Running, statistics: list[GlobalStatistics], method: Method) -> list[Call]:
    """Return calls that update ``running``, as of ``layer``, with all its ``statistics``."""
    updates: list[list[Call]] = []
    for together in _together(statistics):
        others = sum(map(bool, updates))
        if isinstance(method, ChannelAffine):
            made = kernels.updating_running(running, together[0], method, layer.num_features, others=others)
        else:
            made = _moving(layer, running, together, method, others)
        updates.append(made)
    return [call for each in updates for call in each]


def _together(statistics: list[GlobalStatistics]) -> list[list[GlobalStatistics]]:
    """Return ``statistics`` by update: a share that occurs again belongs to another one."""
    groups: list[list[GlobalStatistics]] = []
    for each in statistics:
        if not groups or each.name in {other.name for other in groups[-1]}:
            groups.append([])
        groups[-1].append(each)
    return groups


def _moving(
    layer: _BatchNorm, running: Running, statistics: list[GlobalStatistics], method: Method, others: int
) -> list[Call]:
    device = next((each.device for each in running.buffers.values() if each is not None), statistics[0].means.device)
    statistics = [kernels.moved(each, device) for each in statistics]
    measured = measure(method, layer.num_features)
    shared = {each.name: measured.parts[each.name].read(each.means, 1.0, each.total) for each in statistics}
    targets = measured.targets(method, shared, seen(layer, running))
    whole = torch.stack([each.weight for each in statistics]).prod()
    return kernels.moving(running, targets, statistics[0].total, whole, others=others)


@torch.no_grad()
def updated_running(layer: _BatchNorm, statistics: list[GlobalStatistics], method: Method) -> Running:
    """Return the running statistics of ``layer``, updated with ``statistics``, as copies."""
    live = running_of(layer, guarded=True)
    mean_C, var_C, updates = (None if each is None else each.detach().clone() for each in live[:3])
    declared = {name: each.detach().clone() for name, each in live.declared.items()}
    ahead = Running(mean_C, var_C, updates, live.momentum, guarded=True, declared=declared)
    uninterrupted(*_updating(layer, ahead, statistics, method))
    return ahead


def seen(layer: _BatchNorm, running: Running) -> Layer:
    """Return what a method sees of ``layer``, with ``running`` statistics."""
    parameters = {"weight": layer.weight, "bias": layer.bias}
    for name in getattr(layer, "_site").parameters:  # noqa: B009, every converted layer has one
        parameters[name] = getattr(layer, name)
    return Layer(layer.eps, parameters, running.buffers, running.updates)


def running_of(layer: _BatchNorm, guarded: bool = False) -> Running:
    """Return the running statistics of a layer, read from its dictionary, which is faster than module attributes."""
    buffers = layer._buffers
    if "running_mean" in buffers and "running_var" in buffers and "num_batches_tracked" in buffers:
        found = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    else:
        found = layer.running_mean, layer.running_var, layer.num_batches_tracked
    site = getattr(layer, "_site", None)
    if site is None or not site.buffers:
        return Running(*found, layer.momentum, guarded)
    return Running(*found, layer.momentum, guarded, {name: getattr(layer, name) for name in site.buffers})


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
    """Average running statistics over all ranks: the means of mean and of var + mean^2. One collective.

    Declared buffers of floating-point values are averaged as they are.
    """
    layers = list(layers)
    tracked = [
        (layer.running_mean, layer.running_var)
        for layer in layers
        if layer.running_mean is not None and layer.running_var is not None
    ]
    declared = [
        getattr(layer, name)
        for layer in layers
        for name in buffers_of(layer)[len(BUFFERS) :]
        if getattr(layer, name).is_floating_point()
    ]
    if not (tracked or declared) or group.size == 1:
        return
    pairs = [torch.cat((mean_C, var_C + mean_C.double().square())) for mean_C, var_C in tracked]
    payload = torch.cat([each.double().flatten() for each in (*pairs, *declared)])
    shared = group.sum(payload, Slot("running statistics", "forward", 0)) / group.size
    found = iter(shared.split([each.numel() for each in (*pairs, *declared)]))
    for mean_C, var_C in tracked:
        new_mean_C, square_C = next(found).view(2, -1)
        mean_C.copy_(new_mean_C)
        var_C.copy_((square_C - new_mean_C.square()).clamp_min(0))
    for buffer, values in zip(declared, found, strict=True):
        buffer.copy_(values.view_as(buffer))


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
        for name in buffers_of(layer):
            buffer = getattr(layer, name)
            if buffer is not None:
                yield buffer
