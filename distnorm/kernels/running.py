"""The updates of the running statistics with shared moments, in place, since engines hold references to buffers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from distnorm.compat.uninterrupted import Call, uninterrupted
from distnorm.kernels import dense, gpu
from distnorm.kernels.arithmetic import Shared
from distnorm.types import GlobalStatistics, Moments, Running


def update_from_sums(
    method: Shared, shared: Tensor, running: Running, features: int, completed: Tensor | bool = True
) -> None:
    """Update ``running`` statistics with the moments of ``shared`` sums and their count, for so many ``features``."""
    if completed is False:
        return
    if shared.is_cpu and not torch.compiler.is_compiling():
        # In C if possible, as in the passes of layers: results must be bitwise equal on ranks whose batches take other
        # code paths.
        formula, count = method.formula(), shared[-1].item()
        update_in_c = None if formula is None else dense.updating(formula, shared, count, count, running)
        if update_in_c is not None:
            update_in_c()
            return
    total = shared[-1]  # without gradient, like everything shared
    update_running(
        running, method.moments(shared[:-1].view(-1, features) / total.clamp_min(1), total), total, completed
    )


def update_running(running: Running, moments: Moments, count: Tensor, completed: Tensor | bool) -> None:
    """Update ``running += (moments - running) * momentum``; the plain average over all steps if momentum is None.

    Nothing changes if ``completed`` is 0 or fewer than two values were seen. If guarded, nothing changes either if a
    running statistic of the layer would become non-finite: forwards that read them, or windows, must not keep the
    values of one broken batch. There is no branch for which the host would wait for a GPU.
    """
    if count.is_cpu and not torch.compiler.is_compiling():
        uninterrupted(*_moves(running, moments, count, completed))
        return
    fresh = (completed * (count > 1)).to(count.dtype)
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
    """Return whether running statistics stay finite when they move towards ``moments``."""
    limits = ((fresh_C, torch.finfo(buffer_C.dtype).max / 2) for buffer_C, fresh_C in _pairs(running, moments))
    fits = [(fresh_C.abs() <= limit).all() for fresh_C, limit in limits]
    return torch.stack(fits).all() if fits else moments.var_C.new_ones((), dtype=torch.bool)


def _moves(
    running: Running, moments: Moments, count: Tensor, completed: Tensor | bool, *, others: int = 0
) -> list[Call]:
    """Return the calls that update CPU tensors as ``update_running`` does, after ``others`` other updates."""
    if not (completed and count > 1 and (not running.guarded or _fit(running, moments))):
        return []
    rate, counted = running.momentum or 0.0, []
    if running.updates is not None:
        counted = [partial(running.updates.add_, 1)]
        if running.momentum is None:
            rate = 1 / (float(running.updates) + others + 1)
    pairs = _pairs(running, moments)
    return [*counted, *(partial(buffer_C.lerp_, fresh_C.to(buffer_C.dtype), rate) for buffer_C, fresh_C in pairs)]


def _pairs(running: Running, moments: Moments) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each running statistic and its new value; none for those that were set to None."""
    for buffer_C, fresh_C in ((running.mean_C, moments.mean_C), (running.var_C, moments.var_C)):
        if buffer_C is not None and fresh_C is not None:
            yield buffer_C, fresh_C


def _lerp(buffer_C: Tensor, fresh_C: Tensor, rate: Tensor) -> None:
    # 0 times NaN is NaN, so the new values are replaced if nothing is to change.
    fresh_C = torch.where(rate > 0, fresh_C.to(buffer_C.dtype), buffer_C)
    buffer_C.lerp_(fresh_C, rate.to(buffer_C.dtype))


def updating_running(
    running: Running, statistics: GlobalStatistics, method: Shared, features: int, *, others: int = 0
) -> list[Call]:
    """Return the calls that update ``running`` with statistics of a step that has ended, on their device.

    ``others``: the number of updates before this one. Pass the calls to ``uninterrupted``, with gradients disabled.
    """
    if running.var_C is not None and statistics.means.device != running.var_C.device:  # the layer has been moved since
        statistics = GlobalStatistics(statistics.layer, *(values.to(running.var_C.device) for values in statistics[1:]))
    _, means, total, weight = statistics
    formula = method.formula()
    if means.is_cpu and formula is not None:
        if not weight:
            return []
        update_in_c = dense.updating(formula, means, 1.0, total.item(), running)
        if update_in_c is not None:
            return [update_in_c]
    elif means.is_cuda and formula is not None and running.is_whole and gpu.available():
        from distnorm.kernels.gpu.gpu_pass import update_from_means  # imports Triton

        return [partial(update_from_means, formula, statistics, running)]
    moments = method.moments(means.view(-1, features), total)
    if total.is_cpu:
        return _moves(running, moments, total, weight, others=others)
    return [partial(update_running, running, moments, total, weight)]


@torch.no_grad()
def updated_running(running: Running, statistics: GlobalStatistics, method: Shared, features: int) -> Running:
    """Return what ``updating_running`` would make of ``running``, which does not change."""
    mean_C, var_C, updates = (None if each is None else each.detach().clone() for each in running[:3])
    ahead = Running(mean_C, var_C, updates, running.momentum, running.guarded)
    uninterrupted(*updating_running(ahead, statistics, method, features))
    return ahead
