"""Groups for small all-reduces: what every transport offers, and torch process groups at their lowest latency."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from distnorm.transport.direct import SPIN_S, Direct
from distnorm.transport.rendezvous import group_timeout
from distnorm.transport.schedule import Schedule
from distnorm.transport.senders import Sender, mixed, sender, signature
from distnorm.types import Future, Slot

EXCHANGE_LIMIT_BYTES = 128 * 1024
"""Largest vector that gloo ranks send to each other directly; ``benchmarks/exchange.py`` measures the switch point."""


# docs/decisions.md#groups-are-held-weakly
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


OtherT = TypeVar("OtherT")


def check_group(group: object, owner: str) -> None:
    """Whether ``group``, which ``owner`` was given, is one of this rank, or none.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(group, dist.ProcessGroup | LostGroup | None):
        raise ValueError(
            f"{owner}(process_group={group!r}): not a process group, or not one that covers this rank. Every rank must "
            "pass a group it belongs to (torch.distributed.new_subgroups returns it first)."
        )


def lost(group: dist.ProcessGroup | OtherT) -> LostGroup | OtherT:
    """What a pickle holds for ``group``, if it is one."""
    if isinstance(group, dist.ProcessGroup):
        return LostGroup(f"its process group over ranks {dist.get_process_group_ranks(group)}")
    return group


class Group(ABC):
    """Ranks that share statistics, and what carries these between them."""

    def __init__(self, ranks: tuple[int, ...], schedule: Schedule | None = None) -> None:
        """Join the global ``ranks`` of the job; ``schedule`` compares what they are about to sum."""
        self.ranks = ranks
        self.size = len(ranks)
        self._schedule = schedule

    def sum(self, wire: Tensor, slot: Slot) -> Tensor:
        """Sum of ``wire`` over the group, shape and dtype kept. One collective; none in a group of one rank."""
        if self.size == 1:
            return wire
        self._announce(wire, slot)
        with _timed(slot):
            return self._start(wire.detach(), slot).wait()

    def start(self, wire: Tensor, slot: Slot) -> Future:
        """``sum``, whose result is asked for later. One collective; none in a group of one rank."""
        if self.size == 1:
            return Future.completed(wire)
        self._announce(wire, slot)
        with _timed(slot):
            started = self._start(wire.detach(), slot)
        return _observed(started, slot)

    def sum_async(self, wire_: Tensor, slot: Slot) -> Future:
        """Start summing ``wire_`` over the group, in place. One collective; none in a group of one rank."""
        if self.size == 1:
            return Future.completed(wire_)
        self._announce(wire_, slot)
        with _timed(slot):
            started = self._start_sum(wire_)
        return _observed(started, slot)

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` with the first rank's, in place. One collective; none in a group of one rank."""
        if self.size > 1:
            if self._schedule is not None:
                self._schedule.check("a broadcast", tensor)
            self._broadcast(tensor)

    def _announce(self, wire: Tensor, slot: Slot) -> None:
        """Tell observers and, if so asked for, see that all ranks are at the same collective."""
        if self._schedule is not None:
            self._schedule.check_sum(wire, slot)
        for observer in slot.observers:
            observer.issued(slot, wire.numel() * wire.element_size())

    @abstractmethod
    def _start(self, wire: Tensor, slot: Slot) -> Future:
        """Start a sum among two ranks at least, of which every rank gets the same bits."""

    @abstractmethod
    def _start_sum(self, wire_: Tensor) -> Future:
        """``sum_async``, among two ranks at least; every rank gets the same bits."""

    @abstractmethod
    def _broadcast(self, tensor: Tensor) -> None:
        """``broadcast``, among two ranks at least."""


def backend_for(process_group: dist.ProcessGroup, device: str) -> str | None:
    """Who carries tensors on ``device``, such as "cpu"; None where nobody does.

    A job may have a backend for each device, or have been given none, so that torch chose.
    """
    pairs = (pair.split(":") for pair in dist.get_backend_config(process_group).split(","))
    return dict(pairs).get(device)


class TorchGroup(Group):
    """Sums over the ranks of one process group.

    On gloo an all_reduce of P ranks costs about 2 (P - 1) message rounds and a direct exchange costs one, so small
    vectors are exchanged and added locally, in rank order: every rank gets the same bits. Larger ones, and those on a
    device that another backend serves, use all_reduce. Small vectors on the CPU need no gloo where ranks share memory
    or have sockets of their own.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        ranks: tuple[int, ...],
        *,
        exchange_limit_bytes: int = EXCHANGE_LIMIT_BYTES,
        direct: Direct | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        """Wrap ``process_group``, which joins the global ``ranks``; None where a rank is alone.

        ``direct`` carries small vectors that a rank waits for, where there is a way without gloo.
        """
        super().__init__(ranks, schedule)
        # Weakly: torch ends the threads of a destroyed group when nobody holds it, and threads that outlive the
        # interpreter may abort the process.
        self._process_group = None if process_group is None else ref(process_group)
        self.gloo_devices = () if process_group is None else _served_by_gloo(process_group)
        self.exchange_limit_bytes = exchange_limit_bytes
        self.direct = direct

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """What it wraps.

        Raises:
            RuntimeError: that has been destroyed.
        """
        found = None if self._process_group is None else self._process_group()
        if found is None and self._process_group is not None:
            raise RuntimeError(f"the process group of ranks {list(self.ranks)} has been destroyed.")
        return found

    def _start(self, wire: Tensor, slot: Slot) -> Future:
        who = sender(slot.layer, slot.direction, slot.model)
        if self.direct is not None and self.direct.takes(wire):
            return self.direct.start(wire, who)
        small = wire.numel() * wire.element_size() <= self.exchange_limit_bytes
        if not small or wire.device.type not in self.gloo_devices:
            return self._all_reduce(wire)
        return self._exchange(wire, who)

    def _start_sum(self, wire_: Tensor) -> Future:
        work = dist.all_reduce(wire_, group=self.process_group, async_op=True)
        return _future(work, lambda: wire_, spin=False)

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, src=self.ranks[0], group=self.process_group)

    def _exchange(self, wire: Tensor, who: Sender) -> Future:
        # Behind the values stands who sends them; not on a GPU, where reading it would make the host wait.
        count = wire.numel()
        signed = torch.cat((wire.reshape(-1), signature(who, wire.dtype))) if wire.is_cpu else wire.reshape(-1)
        sent = signed.repeat(self.size)
        received = torch.empty_like(sent)

        def result() -> Tensor | RuntimeError:
            rows = received.view(self.size, -1)
            if wire.is_cpu and set(rows[:, count:].flatten().view(torch.int64).tolist()) != {who.number}:
                assert self.process_group is not None
                return mixed(self.ranks, who.words, group_timeout(self.process_group))
            return rows[:, :count].sum(0).view_as(wire)

        work = dist.all_to_all_single(received, sent, group=self.process_group, async_op=True)
        return _future(work, result, spin=True)

    def _all_reduce(self, wire: Tensor) -> Future:
        total = wire.clone()
        work = dist.all_reduce(total, group=self.process_group, async_op=True)
        return _future(work, lambda: total, spin=wire.is_cpu and "cpu" in self.gloo_devices)


def _future(work: dist.Work, result: Callable[[], Tensor | RuntimeError], *, spin: bool) -> Future:
    """Of a collective of torch's, after which ``result`` gives the sum; ``spin``: busy-wait for it at first."""

    def finish() -> Tensor | RuntimeError:
        if spin:
            until = time.perf_counter() + SPIN_S
            while not work.is_completed() and time.perf_counter() < until:
                os.sched_yield()
        work.wait()
        return result()

    return Future(finish)


def _served_by_gloo(process_group: dist.ProcessGroup) -> tuple[str, ...]:
    return tuple(device for device in ("cpu", "cuda") if backend_for(process_group, device) == "gloo")


@contextmanager
def _timed(slot: Slot) -> Iterator[None]:
    started = time.perf_counter()
    yield
    for observer in slot.observers:
        observer.waited(slot, time.perf_counter() - started)


def _observed(started: Future, slot: Slot) -> Future:
    """``started``, of whose wait the observers of ``slot`` are told."""
    if not slot.observers:
        return started

    def finish() -> Tensor:
        with _timed(slot):
            return started.wait()

    return Future(finish, started.done)
