"""The updates of the running statistics with shared moments, in place, since engines hold references to buffers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from distnorm.compat.uninterrupted import Call, uninterrupted
from distnorm.kernels import dense, gpu
from distnorm.kernels.arithmetic import Tracked
from distnorm.types import GlobalStatistics, Running


def update_from_sums(
    method: Tracked, shared: Tensor, running: Running, features: int, completed: Tensor | bool = True
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


def update_running(running: Running, targets: Mapping[str, Tensor], count: Tensor, completed: Tensor | bool) -> None:
    """Update ``running += (target - running) * momentum``; the plain average over all steps if momentum is None.

    ``targets`` are by the name of the buffer.

    Nothing changes if ``completed`` is 0 or fewer than two values were seen. If guarded, nothing changes either if a
    running statistic of the layer would become non-finite: forwards that read them, or windows, must not keep the
    values of one broken batch. There is no branch for which the host would wait for a GPU.
    """
    if count.is_cpu and not torch.compiler.is_compiling():
        uninterrupted(*_moves(running, targets, count, completed))
        return
    fresh = (completed * (count > 1)).to(count.dtype)
    if running.guarded:
        fresh = fresh * _fit(running, targets)
    momentum: Tensor | float = running.momentum or 0.0
    if running.updates is not None:
        running.updates.add_(fresh.to(running.updates.dtype))
        if running.momentum is None:
            momentum = 1 / running.updates.clamp_min(1)
    for buffer_C, fresh_C in _pairs(running, targets):
        _lerp(buffer_C, fresh_C, fresh * momentum)


def _fit(running: Running, targets: Mapping[str, Tensor]) -> Tensor | bool:
    """Return whether running statistics stay finite when they move towards ``targets``."""
    limits = ((fresh_C, torch.finfo(buffer_C.dtype).max / 2) for buffer_C, fresh_C in _pairs(running, targets))
    fits = [(fresh_C.abs() <= limit).all() for fresh_C, limit in limits]
    return torch.stack(fits).all() if fits else True


def _moves(
    running: Running, targets: Mapping[str, Tensor], count: Tensor, completed: Tensor | bool, *, others: int = 0
) -> list[Call]:
    """Return the calls that update CPU tensors as ``update_running`` does, after ``others`` other updates."""
    if not (completed and count > 1 and (not running.guarded or _fit(running, targets))):
        return []
    rate, counted = running.momentum or 0.0, []
    if running.updates is not None:
        counted = [partial(running.updates.add_, 1)]
        if running.momentum is None:
            rate = 1 / (float(running.updates) + others + 1)
    pairs = _pairs(running, targets)
    return [*counted, *(partial(buffer_C.lerp_, fresh_C.to(buffer_C.dtype), rate) for buffer_C, fresh_C in pairs)]


def _pairs(running: Running, targets: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each running statistic and its target; none for those that were set to None."""
    buffers = running.buffers
    for name, target in targets.items():
        buffer = buffers[name]
        if buffer is not None:
            yield buffer, target


def _lerp(buffer_C: Tensor, fresh_C: Tensor, rate: Tensor) -> None:
    # 0 times NaN is NaN, so the new values are replaced if nothing is to change.
    fresh_C = torch.where(rate > 0, fresh_C.to(buffer_C.dtype), buffer_C)
    buffer_C.lerp_(fresh_C, rate.to(buffer_C.dtype))


def updating_running(
    running: Running, statistics: GlobalStatistics, method: Tracked, features: int, *, others: int = 0
) -> list[Call]:
    """Return the calls that update ``running`` with statistics of a step that has ended, on their device.

    ``others``: the number of updates before this one. Pass the calls to ``uninterrupted``, with gradients disabled.
    """
    if running.var_C is not None and statistics.means.device != running.var_C.device:  # the layer has been moved since
        statistics = moved(statistics, running.var_C.device)
    _, means, total, weight, _ = statistics
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
    return moving(running, method.moments(means.view(-1, features), total), total, weight, others=others)


def moving(
    running: Running, targets: Mapping[str, Tensor], total: Tensor, completed: Tensor, *, others: int = 0
) -> list[Call]:
    """Return calls that ``update_running`` after ``others`` other updates, without interruption."""
    if total.is_cpu:
        return _moves(running, targets, total, completed, others=others)
    return [partial(update_running, running, targets, total, completed)]


def moved(statistics: GlobalStatistics, device: torch.device) -> GlobalStatistics:
    """Return ``statistics`` on ``device``."""
    means, total, weight = (each.to(device) for each in statistics[1:4])
    return statistics._replace(means=means, total=total, weight=weight)
