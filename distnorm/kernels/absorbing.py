"""Running statistics absorb what was shared: a step's moments, in place, since engines hold references to buffers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from distnorm.compat.at_once import Call, at_once
from distnorm.kernels import dense, gpu
from distnorm.kernels.arithmetic import Shared
from distnorm.types import Landed, Moments, Running


def absorb_shared(
    method: Shared, shared: Tensor, running: Running, features: int, landed: Tensor | bool = True
) -> None:
    """``absorb`` what ``method`` makes of ``shared`` sums and their count, for so many ``features``."""
    if landed is False:
        return
    if shared.is_cpu and not torch.compiler.is_compiling():
        # In C where that can be, as layers' passes do: ranks whose batches take other paths must agree to the bit.
        formula, count = method.formula(), shared[-1].item()
        absorb_in_c = None if formula is None else dense.absorbing(formula, shared, count, count, running)
        if absorb_in_c is not None:
            absorb_in_c()
            return
    total = shared[-1]  # without gradient, like all that was shared
    absorb(running, method.moments(shared[:-1].view(-1, features) / total.clamp_min(1), total), total, landed)


def absorb(running: Running, moments: Moments, count: Tensor, landed: Tensor | bool) -> None:
    """``running += (moments - running) * momentum``, or their plain average over all steps if momentum is None.

    Nothing happens where ``landed`` is 0 or fewer than two values were seen; nor, if guarded, where that would not
    leave all running statistics of the layer finite: where a forward reads them, or windows beside them stay clean,
    one broken batch must not last. Branch-free where a branch would make the host wait for a GPU.
    """
    if count.is_cpu and not torch.compiler.is_compiling():
        at_once(*_moves(running, moments, count, landed))
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


def _moves(running: Running, moments: Moments, count: Tensor, landed: Tensor | bool, *, others: int = 0) -> list[Call]:
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


def absorbing_landed(running: Running, landed: Landed, method: Shared, features: int, *, others: int = 0) -> list[Call]:
    """Calls that, made at once, ``absorb`` what became global at a step's end, on whichever device that is.

    ``others``: how many come before. Not where gradients are on.
    """
    if running.var_C is not None and landed.means.device != running.var_C.device:  # the layer has moved since
        landed = Landed(landed.layer, *(values.to(running.var_C.device) for values in landed[1:]))
    _, means, total, weight = landed
    formula = method.formula()
    if means.is_cpu and formula is not None:
        if not weight:
            return []
        absorb_in_c = dense.absorbing(formula, means, 1.0, total.item(), running)
        if absorb_in_c is not None:
            return [absorb_in_c]
    elif means.is_cuda and formula is not None and running.is_whole and gpu.available():
        from distnorm.kernels.gpu.gpu_pass import absorb_means  # imports Triton

        return [partial(absorb_means, formula, landed, running)]
    moments = method.moments(means.view(-1, features), total)
    if total.is_cpu:
        return _moves(running, moments, total, weight, others=others)
    return [partial(absorb, running, moments, total, weight)]


@torch.no_grad()
def with_landed(running: Running, landed: Landed, method: Shared, features: int) -> Running:
    """What ``absorbing_landed`` would make of ``running``, which stays as it is."""
    mean_C, var_C, updates = (None if each is None else each.detach().clone() for each in running[:3])
    ahead = Running(mean_C, var_C, updates, running.momentum, running.guarded)
    at_once(*absorbing_landed(ahead, landed, method, features))
    return ahead
