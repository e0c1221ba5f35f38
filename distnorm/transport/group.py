"""Groups for small all-reduces: the interface of every transport, and torch process groups at their lowest latency."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from distnorm.compat.uninterrupted import Call, uninterrupted
from distnorm.transport.direct import Direct
from distnorm.transport.rendezvous import group_timeout
from distnorm.transport.schedule import Schedule
from distnorm.transport.senders import Sender, mixed, sender, signature
from distnorm.transport.torch_work import future_of, wait
from distnorm.types import Future, Slot

EXCHANGE_LIMIT_BYTES = 128 * 1024
"""Largest vector, in bytes, that gloo ranks send each other directly; ``benchmarks/exchange.py`` measures the limit."""


# docs/decisions.md#groups-are-held-weakly
@dataclass(frozen=True)
class LostGroup:
    """A placeholder in a pickled recipe for a process group, which is valid only in the process that created it."""

    what: str

    def refuse(self) -> RuntimeError:
        """Return the error that training with the copy raises."""
        return RuntimeError(
            f"this layer was unpickled, and {self.what} cannot be pickled. The layer can evaluate; "
            "to train it, call distnorm.revert(model), then distnorm.convert(model, ...) with a group of this process."
        )


OtherT = TypeVar("OtherT")


def check_group(group: object, owner: str) -> None:
    """Check that ``group``, which ``owner`` was given, is None or a process group of this rank.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(group, dist.ProcessGroup | LostGroup | None):
        raise ValueError(
            f"{owner}(process_group={group!r}): not a process group, or not one that covers this rank. Every rank must "
            "pass a group it belongs to (torch.distributed.new_subgroups returns it first)."
        )


def lost(group: dist.ProcessGroup | OtherT) -> LostGroup | OtherT:
    """Return what a pickle contains in place of ``group``: a ``LostGroup`` if it is a process group, else itself."""
    if isinstance(group, dist.ProcessGroup):
        return LostGroup(f"its process group over ranks {dist.get_process_group_ranks(group)}")
    return group


class Group(ABC):
    """Ranks that share statistics, and the transport between them."""

    def __init__(self, ranks: tuple[int, ...], schedule: Schedule | None = None) -> None:
        """Join the global ``ranks`` of the job; ``schedule`` checks that they are about to sum the same."""
        self.ranks = ranks
        self.size = len(ranks)
        self._schedule = schedule

    def sum(self, payload: Tensor, slot: Slot) -> Tensor:
        """Return the sum of ``payload`` over the group, of equal shape and dtype. One collective; none for one rank."""
        if self.size == 1:
            return payload
        self._announce(payload, slot)
        with _timed(slot):
            return self._start(payload.detach(), slot).wait()

    def max(self, payload: Tensor, slot: Slot) -> Tensor:
        """Return ``[maxima over the group, how many values attain them, count]`` of such a ``payload``. One collective.

        Exact, with any transport: it sums a matrix in which every rank fills its row.
        """
        if self.size == 1:
            return payload
        place = self.ranks.index(dist.get_rank())
        rows = torch.nn.functional.pad(payload.detach()[None], (0, 0, place, self.size - place - 1))
        rows = self.sum(rows.flatten(), slot).view_as(rows)
        local, ties = rows[:, :-1].view(self.size, 2, -1).unbind(1)
        maxima = local.amax(0)
        return torch.cat((maxima, torch.where(local == maxima, ties, 0).sum(0), rows[:, -1:].sum(0)))

    def start(self, payload: Tensor, slot: Slot) -> Future:
        """Start ``sum`` and return a future. One collective; none in a group of one rank."""
        if self.size == 1:
            return Future.completed(payload)
        self._announce(payload, slot)
        with _timed(slot):
            started = self._start(payload.detach(), slot)
        return _observed(started, slot)

    def sum_async(self, payload_: Tensor, slot: Slot, then: Callable[[Future], list[Call]] = lambda _: []) -> Future:
        """Start summing ``payload_`` over the group, in place. One collective; none in a group of one rank.

        ``then``: returns calls for the future. They and the start run without interruption, or not at all; see
        ``uninterrupted``.
        """
        if self.size == 1:
            future = Future.completed(payload_)
            uninterrupted(*then(future))
            return future
        self._announce(payload_, slot)
        future, start = self._prepare_sum(payload_)
        future = _observed(future, slot)
        with _timed(slot):
            uninterrupted(start, *then(future))
        return future

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` with the first rank's, in place. One collective; none in a group of one rank."""
        if self.size > 1:
            if self._schedule is not None:
                self._schedule.check("a broadcast", tensor)
            self._broadcast(tensor)

    def _announce(self, payload: Tensor, slot: Slot) -> None:
        """Notify observers and, if requested, check that all ranks are at the same collective."""
        if self._schedule is not None:
            self._schedule.check_sum(payload, slot)
        for observer in slot.observers:
            observer.issued(slot, payload.numel() * payload.element_size())

    @abstractmethod
    def _start(self, payload: Tensor, slot: Slot) -> Future:
        """Start a sum among at least two ranks, whose results are bitwise equal on all ranks."""

    @abstractmethod
    def _prepare_sum(self, payload_: Tensor) -> tuple[Future, Call]:
        """Return the future of an in-place sum among at least two ranks, and the call to start it; as ``_start``."""

    @abstractmethod
    def _broadcast(self, tensor: Tensor) -> None:
        """Broadcast among at least two ranks."""


def backend_for(process_group: dist.ProcessGroup, device: str) -> str | None:
    """Return the backend for tensors on ``device``, such as "cpu"; None if there is none.

    A job may have a backend for each device, or have been started without one, so that torch chose.
    """
    pairs = (pair.split(":") for pair in dist.get_backend_config(process_group).split(","))
    return dict(pairs).get(device)


class TorchGroup(Group):
    """Sums over the ranks of one process group.

    On gloo an all_reduce of P ranks takes about 2 (P - 1) message rounds, and a direct exchange takes one. Small
    vectors are therefore exchanged and added locally in rank order, with bitwise equal results on all ranks. Larger
    ones, and those on a device of another backend, use all_reduce. Small vectors on the CPU do not need gloo if ranks
    share memory or have their own sockets.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        ranks: tuple[int, ...],
        *,
        exchange_limit_bytes: int = EXCHANGE_LIMIT_BYTES,
        direct: Direct | None = None,
        beside: Direct | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        """Wrap ``process_group`` over the global ``ranks``; None for a single rank.

        ``direct`` sends small vectors that a rank waits for, if that is possible without gloo. ``beside``: what shows,
        while gloo works, that another rank has ended; ``direct`` by default.
        """
        super().__init__(ranks, schedule)
        # Weakly: torch ends the threads of a destroyed group once nothing references it, and threads that outlive the
        # interpreter may abort the process.
        self._process_group = None if process_group is None else ref(process_group)
        self.gloo_devices = () if process_group is None else _served_by_gloo(process_group)
        self.exchange_limit_bytes = exchange_limit_bytes
        self.direct = direct
        self._beside = beside or direct

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """Return the wrapped process group.

        Raises:
            RuntimeError: it has been destroyed.
        """
        found = None if self._process_group is None else self._process_group()
        if found is None and self._process_group is not None:
            raise RuntimeError(f"the process group of ranks {list(self.ranks)} has been destroyed.")
        return found

    def _start(self, payload: Tensor, slot: Slot) -> Future:
        who = sender(slot.layer, slot.name, slot.direction, slot.model)
        if self.direct is not None and self.direct.takes(payload):
            return self.direct.start(payload, who)
        small = payload.numel() * payload.element_size() <= self.exchange_limit_bytes
        if not small or payload.device.type not in self.gloo_devices:
            return self._all_reduce(payload)
        return self._exchange(payload, who)

    def _prepare_sum(self, payload_: Tensor) -> tuple[Future, Call]:
        # dist.all_reduce is a Python function: an exception in it may lose the work of a sum that was started.
        options = dist.AllreduceOptions()
        options.asyncOp = True
        assert self.process_group is not None
        works: list[dist.Work] = []

        def finish() -> Tensor:
            wait(works[0], self._beside if payload_.is_cpu else None)
            return payload_

        return Future(finish), partial(works.extend, map(self.process_group.allreduce, ([payload_],), (options,)))

    def _broadcast(self, tensor: Tensor) -> None:
        dist.broadcast(tensor, src=self.ranks[0], group=self.process_group)

    def _exchange(self, payload: Tensor, who: Sender) -> Future:
        # The sender is appended to the values; not on a GPU, where the host would wait to read it.
        count = payload.numel()
        signed = (
            torch.cat((payload.reshape(-1), signature(who, payload.dtype))) if payload.is_cpu else payload.reshape(-1)
        )
        sent = signed.repeat(self.size)
        received = torch.empty_like(sent)

        def result() -> Tensor | RuntimeError:
            rows = received.view(self.size, -1)
            if payload.is_cpu and set(rows[:, count:].flatten().view(torch.int64).tolist()) != {who.number}:
                assert self.process_group is not None
                return mixed(self.ranks, who.words, group_timeout(self.process_group))
            return rows[:, :count].sum(0).view_as(payload)

        work = dist.all_to_all_single(received, sent, group=self.process_group, async_op=True)
        return future_of(work, result, self._beside, spin=True)

    def _all_reduce(self, payload: Tensor) -> Future:
        total = payload.clone()
        work = dist.all_reduce(total, group=self.process_group, async_op=True)
        by_gloo = payload.is_cpu and "cpu" in self.gloo_devices
        return future_of(work, lambda: total, self._beside if by_gloo else None, spin=by_gloo)


def _served_by_gloo(process_group: dist.ProcessGroup) -> tuple[str, ...]:
    return tuple(device for device in ("cpu", "cuda") if backend_for(process_group, device) == "gloo")


@contextmanager
def _timed(slot: Slot) -> Iterator[None]:
    started = time.perf_counter()
    yield
    for observer in slot.observers:
        observer.waited(slot, time.perf_counter() - started)


def _observed(started: Future, slot: Slot) -> Future:
    """Return ``started`` such that the observers of ``slot`` are notified of the wait."""
    if not slot.observers:
        return started

    def finish() -> Tensor:
        with _timed(slot):
            return started.wait()

    return Future(finish, started.done)
