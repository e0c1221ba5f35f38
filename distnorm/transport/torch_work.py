"""Waiting for the collectives of torch's process groups."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from distnorm.transport.direct import SPIN_S, Direct
from distnorm.transport.patience import LOOK_S
from distnorm.types import Future

LOOKS_AFTER_END = 15
"""How often a waiting rank looks after another one has ended: what that had sent may still arrive."""

Answer = Tensor | RuntimeError


def future_of(work: dist.Work, result: Callable[[], Answer], beside: Direct | None, *, spin: bool) -> Future:
    """Return the future of ``work``, after which ``result`` returns the sum; ``spin``: busy-wait at first."""

    def finish() -> Answer:
        if spin:
            until = time.perf_counter() + SPIN_S
            while not work.is_completed() and time.perf_counter() < until:
                os.sched_yield()
        wait(work, beside)
        return result()

    return Future(finish)


# docs/decisions.md#ranks-that-end-while-gloo-works
def wait(work: dist.Work, beside: Direct | None) -> None:
    """Wait for ``work``; if it is gloo's, and the same ranks are connected ``beside`` it, watch that connection.

    Raises:
        RuntimeError: it failed, or another rank has ended and can send nothing more.
    """
    if beside is None:
        work.wait()
        return
    looks = 0
    while True:
        try:
            work.wait(timedelta(seconds=LOOK_S))
            return
        except RuntimeError:  # the slice is over, or the work has failed
            if work.is_completed():
                work.wait()
                return
        gone = beside.gone()
        looks = 0 if gone is None else looks + 1
        if gone is not None and looks > LOOKS_AFTER_END:
            raise beside.ended(gone)
