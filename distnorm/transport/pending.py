"""Sums that were started, and what waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from distnorm.types import Slot


class Work(Protocol):
    """A collective that was started."""

    def wait(self) -> object:
        """Return when it is done."""
        ...


class Pending:
    """A sum that is under way, or about to be."""

    def __init__(self, wire_: Tensor, slot: Slot) -> None:
        """Of ``wire_``, in place."""
        self.wire, self.slot = wire_, slot
        self.works: list[Work] = []
        """What sums it; none if it is done, or was not sent yet."""

    def wait(self) -> Tensor:
        """The sum; waits once. On a GPU the current stream waits, not the host."""
        if self.works:
            with timed(self.slot):
                self.works[0].wait()
            self.works = []  # not before: a sum that failed must fail again
        return self.wire

    def to(self, device: torch.device) -> None:
        """Wait, and keep the sum on ``device``."""
        self.wire = moved(self.wait(), device)


def moved(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; zeros in place of those of a meta tensor, which has none."""
    return torch.zeros_like(values, device=device) if values.is_meta else values.to(device)


class Later:
    """The sum of a vector that is left as it was, once it is there."""

    def __init__(self, work: Work | None, result: Callable[[], Tensor], slot: Slot) -> None:
        """``work`` makes ``result`` possible; None if it is already."""
        self._work = work
        self._result = result
        self._slot = slot

    def wait(self) -> Tensor:
        """The sum. On a GPU the current stream waits, not the host."""
        if self._work is not None:
            with timed(self._slot):
                self._work.wait()
        return self._result()


@contextmanager
def timed(slot: Slot) -> Iterator[None]:
    """Tell the observers of ``slot`` how long this rank waited."""
    started = time.perf_counter()
    yield
    for observer in slot.observers:
        observer.waited(slot, time.perf_counter() - started)
