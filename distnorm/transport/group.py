"""A torch process group that sums small vectors at the lowest latency its backend allows."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distnorm.types import Slot

EXCHANGE_LIMIT_BYTES = 128 * 1024
"""Largest vector that gloo ranks send to each other directly; ``benchmarks/exchange.py`` measures the switch point."""


@dataclass(frozen=True)
class LostGroup:
    """Stands in a pickled recipe where a process group was: groups belong to the process that made them."""

    what: str

    def refuse(self) -> RuntimeError:
        """The error that training with the copy raises."""
        return RuntimeError(
            f"this layer was unpickled, and {self.what} cannot travel in a pickle. It evaluates as it is; "
            "to train it, call distnorm.revert(model), then distnorm.convert(model, ...) with a group of this process."
        )


class Pending:
    """A sum that is under way."""

    def __init__(self, wire_: Tensor, work: dist.Work | None, slot: Slot, seconds: float) -> None:
        """``seconds``: host time spent on it so far."""
        self.step = slot.step
        self._wire = wire_
        self._work = work
        self._slot = slot
        self._seconds = seconds

    def wait(self) -> Tensor:
        """The sum; waits once. On a GPU the current stream waits, not the host."""
        if self._work is not None:
            started = time.perf_counter()
            self._work.wait()
            self._work = None  # not before: a sum that failed must fail again
            seconds = self._seconds + time.perf_counter() - started
            for observe in self._slot.observers:
                observe(self._slot, self._wire.numel() * self._wire.element_size(), seconds)
        return self._wire


class TorchGroup:
    """Sums over the ranks of one process group.

    On gloo an all_reduce of P ranks costs about 2 (P - 1) message rounds and a direct exchange costs one, so small
    vectors are exchanged and added locally, in rank order: every rank gets the same bits. Larger ones, and those of
    other backends, go by all_reduce.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        ranks: tuple[int, ...],
        *,
        exchange_limit_bytes: int = EXCHANGE_LIMIT_BYTES,
    ) -> None:
        """Wrap ``process_group``, which joins the global ``ranks``; None where a rank is alone."""
        self.process_group = process_group
        self.ranks = ranks
        self.size = len(ranks)
        gloo = process_group is not None and dist.get_backend(process_group) == "gloo"
        self.exchange_limit_bytes = exchange_limit_bytes if gloo else -1

    def sum(self, wire: Tensor, slot: Slot) -> Tensor:
        """Sum of ``wire`` over the group, shape and dtype kept. One collective; none in a group of one rank."""
        if self.size == 1:
            return wire
        started = time.perf_counter()
        nbytes = wire.numel() * wire.element_size()
        total = self._exchange(wire) if nbytes <= self.exchange_limit_bytes else self._all_reduce(wire)
        for observe in slot.observers:
            observe(slot, nbytes, time.perf_counter() - started)
        return total

    def sum_async(self, wire_: Tensor, slot: Slot) -> Pending:
        """Start summing ``wire_`` over the group, in place. One collective; none in a group of one rank."""
        started = time.perf_counter()
        work = dist.all_reduce(wire_, group=self.process_group, async_op=True) if self.size > 1 else None
        return Pending(wire_, work, slot, time.perf_counter() - started)

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` with the first rank's, in place. One collective; none in a group of one rank."""
        if self.size > 1:
            dist.broadcast(tensor, src=self.ranks[0], group=self.process_group)

    def _exchange(self, wire: Tensor) -> Tensor:
        sent = wire.detach().reshape(-1).repeat(self.size)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.process_group)
        return received.view(self.size, -1).sum(0).view_as(wire)

    def _all_reduce(self, wire: Tensor) -> Tensor:
        total = wire.detach().clone()
        dist.all_reduce(total, group=self.process_group)
        return total
