"""Running statistics: absorbing a step's moments, and making them equal on all ranks.

Every function changes buffers in place: engines hold references to them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.compat.at_once import Call, at_once
from distnorm.kernels import dense, gpu
from distnorm.methods import ChannelAffine, Method
from distnorm.transport import Group
from distnorm.types import Landed, Moments, Running, Slot

logger = logging.getLogger("distnorm")

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def absorb_shared(
    layer: _BatchNorm, method: Method, shared: Tensor, landed: Tensor | bool, *, guarded: bool = False
) -> None:
    """``absorb`` what ``method`` makes of ``shared`` sums and their count, which ``landed`` or did not."""
    if landed is False:
        return
    running = running_of(layer, guarded=guarded)
    formula = method.formula() if isinstance(method, ChannelAffine) else None
    if shared.is_cpu and not torch.compiler.is_compiling() and formula is not None and running.is_whole:
        # In C where that can be, as layers' passes do: ranks whose batches take other paths must agree to the bit.
        if not landed or dense.absorb(formula, shared, running):
            return
    count = shared[-1]  # without gradient, like all that was shared
    moments = method.moments(shared[:-1].view(-1, layer.num_features) / count.clamp_min(1), count)
    absorb(running, moments, count, landed)


def absorb(running: Running, moments: Moments, count: Tensor, landed: Tensor | bool) -> None:
    """``running += (moments - running) * momentum``, or their plain average over all steps if momentum is None.

    Nothing happens where ``landed`` is 0 or fewer than two values were seen; nor, if guarded, where that would not
    leave all running statistics of the layer finite: where a forward reads them, or windows beside them stay clean,
    one broken batch must not last. Branch-free where a branch would make the host wait for a GPU.
    """
    if count.is_cpu and not torch.compiler.is_compiling():
        at_once(*_moving(running, moments, count, landed))
        return
    fresh = (landed * (count > 1)).to(count.dtype)
    if running.guarded:
        fresh = fresh * _fit(running, moments)
    momentum: Tensor | float = running.momentum or 0.0
    if running.updates is not None:
        running.updates.add_(fresh.to(running.updates.dtype))
        if running.momentum is None:
            momentum = 1 / running.updates.clamp_min(1)
    for buffer_C, fresh_C in _pairs(running, moments):
        _lerp(buffer_C, fresh_C, fresh * momentum)


def _fit(running: Running, moments: Moments) -> Tensor:
    """Whether running statistics stay finite when they move towards ``moments``."""
    limits = ((fresh_C, torch.finfo(buffer_C.dtype).max / 2) for buffer_C, fresh_C in _pairs(running, moments))
    fits = [(fresh_C.abs() <= limit).all() for fresh_C, limit in limits]
    return torch.stack(fits).all() if fits else moments.var_C.new_ones((), dtype=torch.bool)


def _moving(running: Running, moments: Moments, count: Tensor, landed: Tensor | bool, *, others: int = 0) -> list[Call]:
    """What ``absorb`` does with tensors, on the CPU, after ``others`` that are to be done before."""
    if not (landed and count > 1 and (not running.guarded or _fit(running, moments))):
        return []
    rate, counted = running.momentum or 0.0, []
    if running.updates is not None:
        counted = [partial(running.updates.add_, 1)]
        if running.momentum is None:
            rate = 1 / (float(running.updates) + others + 1)
    pairs = _pairs(running, moments)
    return [*counted, *(partial(buffer_C.lerp_, fresh_C.to(buffer_C.dtype), rate) for buffer_C, fresh_C in pairs)]


def _pairs(running: Running, moments: Moments) -> Iterator[tuple[Tensor, Tensor]]:
    """Running statistics and what they absorb; none, if they were set to None."""
    for buffer_C, fresh_C in ((running.mean_C, moments.mean_C), (running.var_C, moments.var_C)):
        if buffer_C is not None and fresh_C is not None:
            yield buffer_C, fresh_C


def _lerp(buffer_C: Tensor, fresh_C: Tensor, rate: Tensor) -> None:
    # 0 times NaN is NaN: where nothing is absorbed, nothing may enter.
    fresh_C = torch.where(rate > 0, fresh_C.to(buffer_C.dtype), buffer_C)
    buffer_C.lerp_(fresh_C, rate.to(buffer_C.dtype))


@torch.no_grad()
def absorb_landed(running: Running, landed: Landed, method: Method, features: int) -> None:
    """``absorb`` what became global at a step's end, on whichever device that is."""
    at_once(*_absorbing(running, landed, method, features))


def _absorbing(running: Running, landed: Landed, method: Method, features: int, others: int = 0) -> list[Call]:
    if running.var_C is not None and landed.means.device != running.var_C.device:  # the layer has moved since
        landed = Landed(landed.layer, *(values.to(running.var_C.device) for values in landed[1:]))
    formula = method.formula() if landed.means.is_cuda and isinstance(method, ChannelAffine) else None
    if formula is not None and gpu.available() and running.is_whole:
        from distnorm.kernels.gpu.gpu_pass import absorb_means  # imports Triton

        return [partial(absorb_means, formula, landed, running)]
    moments = method.moments(landed.means.view(-1, features), landed.total)
    given = running, moments, landed.total, landed.weight
    return _moving(*given, others=others) if landed.total.is_cpu else [partial(absorb, *given)]


def absorbing(layers: Mapping[str, _BatchNorm], landed: Iterable[Landed], method: Method) -> list[Call]:
    """What does ``absorb_landed`` at once, for those of ``layers`` that track; guarded, as windows are."""
    calls: dict[str, list[list[Call]]] = {}
    for each in landed:
        layer = layers.get(each.layer)
        if layer is not None and layer.track_running_stats:
            earlier = calls.setdefault(each.layer, [])
            running = running_of(layer, guarded=True)
            earlier.append(_absorbing(running, each, method, layer.num_features, sum(map(bool, earlier))))
    return [call for of_layer in calls.values() for each in of_layer for call in each]


def with_landed(running: Running, landed: Landed, method: Method, features: int) -> Running:
    """What ``absorb_landed`` would make of ``running``, which stays as it is."""
    mean_C, var_C, updates = (None if each is None else each.detach().clone() for each in running[:3])
    ahead = Running(mean_C, var_C, updates, running.momentum, running.guarded)
    absorb_landed(ahead, landed, method, features)
    return ahead


def running_of(layer: _BatchNorm, *, guarded: bool = False) -> Running:
    """The running statistics of a layer."""
    return Running(layer.running_mean, layer.running_var, layer.num_batches_tracked, layer.momentum, guarded)


@torch.no_grad()
def fold_means(layers: Iterable[_BatchNorm]) -> None:
    """Turn stock running statistics into those of a method without centring: var + mean^2 about a mean of 0.

    Stock running statistics evaluate as they are until training goes on; then they must mean what the method tracks.
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
    """Give every rank of ``group`` the running statistics of its first rank. One broadcast per dtype.

    What is equal is not written: a frozen layer that ran before may have saved it for backward.
    """
    if group.size == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in _buffers(layers):
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        device = buffers[0].device  # where layers lie on several, their statistics travel from the first one's
        flat = torch.cat([buffer.flatten().to(device) for buffer in buffers])
        group.broadcast(flat)
        for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            values = values.view_as(buffer).to(buffer.device)
            if not torch.equal(buffer, values):
                buffer.copy_(values)


@torch.no_grad()
def average(layers: Iterable[_BatchNorm], group: Group) -> None:
    """Make running statistics those of all ranks together: means of mean and of var + mean^2. One collective."""
    tracked = [
        (layer.running_mean, layer.running_var)
        for layer in layers
        if layer.running_mean is not None and layer.running_var is not None
    ]
    if not tracked or group.size == 1:
        return
    wire = torch.cat([torch.cat((mean_C, var_C + mean_C.double().square())) for mean_C, var_C in tracked]).double()
    shared = group.sum(wire, Slot("running statistics", "forward", 0)) / group.size
    sizes = [mean_C.numel() for mean_C, _ in tracked]
    for (mean_C, var_C), both in zip(tracked, shared.split([2 * size for size in sizes]), strict=True):
        new_mean_C, square_C = both.view(2, -1)
        mean_C.copy_(new_mean_C)
        var_C.copy_((square_C - new_mean_C.square()).clamp_min(0))


def snapshot(layers: Iterable[tuple[str, _BatchNorm]]) -> dict[str, list[Tensor]]:
    """Copies of running statistics, by layer."""
    return {name: [buffer.detach().clone() for buffer in _buffers([layer])] for name, layer in layers}


@torch.no_grad()
def restore(layers: Iterable[tuple[str, _BatchNorm]], saved: Mapping[str, list[Tensor]]) -> None:
    """Put what ``snapshot`` copied back; layers that it does not know stay as they are."""
    for name, layer in layers:
        for buffer, values in zip(_buffers([layer]), saved.get(name, ()), strict=False):
            buffer.copy_(values)


def _buffers(layers: Iterable[_BatchNorm]) -> Iterator[Tensor]:
    for layer in layers:
        for name in BUFFERS:
            buffer = getattr(layer, name)
            if buffer is not None:
                yield buffer
