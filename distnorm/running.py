"""Running statistics: absorbing a step's moments, and making them equal on all ranks.

Every function changes buffers in place: engines hold references to them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.kernels import gpu
from distnorm.methods import ChannelAffine, Method
from distnorm.transport import Group
from distnorm.types import Landed, Moments, Running, Slot

logger = logging.getLogger("distnorm")

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def absorb_shared(layer: _BatchNorm, method: Method, shared: Tensor, landed: Tensor | bool) -> None:
    """``absorb`` what ``method`` makes of ``shared`` sums and their count, which ``landed`` or did not."""
    if shared.is_cpu and not torch.compiler.is_compiling():
        if landed:
            _absorb_now(layer, method, shared)
        return
    count = shared[-1]
    with torch.no_grad():
        moments = method.moments(shared[:-1].view(-1, layer.num_features) / count.clamp_min(1), count)
        absorb(layer, moments, count, landed)


def _absorb_now(layer: _BatchNorm, method: Method, shared: Tensor) -> None:
    count = shared[-1]
    if count > 1:
        _move(layer, method.moments(shared[:-1].view(-1, layer.num_features) / count, count), _next_rate(layer))


def absorb(layer: _BatchNorm, moments: Moments, count: Tensor, landed: Tensor | bool) -> None:
    """``running += (moments - running) * momentum``, or their plain average over all steps if momentum is None.

    Nothing happens where ``landed`` is 0 or fewer than two values were seen. Branch-free where a branch would make the
    host wait for a GPU.
    """
    if count.is_cpu and not torch.compiler.is_compiling():
        if landed and count > 1:
            _move(layer, moments, _next_rate(layer))
        return
    mean_C, var_C = layer.running_mean, layer.running_var
    assert mean_C is not None and var_C is not None and layer.num_batches_tracked is not None
    fresh = (landed * (count > 1)).to(count.dtype)
    layer.num_batches_tracked.add_(fresh.to(layer.num_batches_tracked.dtype))
    momentum = layer.momentum if layer.momentum is not None else 1 / layer.num_batches_tracked.clamp_min(1)
    rate = fresh * momentum
    if moments.mean_C is not None:
        _lerp(mean_C, moments.mean_C, rate)
    _lerp(var_C, moments.var_C, rate)


def _next_rate(layer: _BatchNorm) -> float:
    """Count a step that needs no caution, and return the weight of its moments: what ``absorb`` does with tensors."""
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    return layer.momentum if layer.momentum is not None else 1 / float(layer.num_batches_tracked)


def _move(layer: _BatchNorm, moments: Moments, rate: float) -> None:
    assert layer.running_mean is not None and layer.running_var is not None
    if moments.mean_C is not None:
        layer.running_mean.lerp_(moments.mean_C.to(layer.running_mean.dtype), rate)
    layer.running_var.lerp_(moments.var_C.to(layer.running_var.dtype), rate)


def _lerp(buffer_C: Tensor, fresh_C: Tensor, rate: Tensor) -> None:
    # 0 times NaN is NaN: where nothing is absorbed, nothing may enter.
    fresh_C = torch.where(rate > 0, fresh_C.to(buffer_C.dtype), buffer_C)
    buffer_C.lerp_(fresh_C, rate.to(buffer_C.dtype))


@torch.no_grad()
def absorb_landed(layers: Mapping[str, _BatchNorm], landed: Iterable[Landed], method: Method) -> None:
    """``absorb`` what became global at a step's end."""
    for each in landed:
        layer = layers.get(each.layer)
        if layer is None or layer.running_var is None:
            continue
        formula = method.formula() if each.means.is_cuda and isinstance(method, ChannelAffine) else None
        if formula is not None and gpu.available():
            from distnorm.kernels.gpu.gpu_pass import absorb_means  # imports Triton

            absorb_means(formula, each, running_of(layer))
        else:
            moments = method.moments(each.means.view(-1, layer.num_features), each.total)
            absorb(layer, moments, each.total, each.weight)


def running_of(layer: _BatchNorm) -> Running:
    """The running statistics of a layer that tracks them."""
    mean_C, var_C, updates = layer.running_mean, layer.running_var, layer.num_batches_tracked
    assert mean_C is not None and var_C is not None and updates is not None
    return Running(mean_C, var_C, updates, layer.momentum)


@torch.no_grad()
def fold_means(layers: Iterable[_BatchNorm]) -> None:
    """Turn stock running statistics into those of a method without centring: var + mean^2 about a mean of 0.

    Stock running statistics evaluate as they are until training goes on; then they must mean what the method tracks.
    """
    folded = 0
    for layer in layers:
        if layer.running_mean is not None and layer.running_var is not None and bool(layer.running_mean.any()):
            layer.running_var.add_(layer.running_mean.square())
            layer.running_mean.zero_()
            folded += 1
    if folded:
        logger.info("running statistics of %d layers: running_var += running_mean^2, running_mean = 0", folded)


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
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        group.broadcast(flat)
        for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            if not torch.equal(buffer, values.view_as(buffer)):
                buffer.copy_(values.view_as(buffer))


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


def _buffers(layers: Iterable[_BatchNorm]) -> Iterator[Tensor]:
    for layer in layers:
        for name in BUFFERS:
            buffer = getattr(layer, name)
            if buffer is not None:
                yield buffer
