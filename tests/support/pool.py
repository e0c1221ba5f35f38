"""A session-long pool of gloo processes: what threads cannot show, at the price of starting processes once.

Functions must be importable (defined at module level) and their arguments, results and exceptions picklable. Each run
starts from ``torch.manual_seed(0)``, with one thread per process. Test modules are imported plainly in the processes:
prefer ``torch.testing.assert_close`` to bare ``assert`` there, or return values and assert in the test.
"""

from __future__ import annotations

import itertools
import math
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self, TypeVar

import torch.distributed as dist

from tests.support.process import START_S, WorkerProcess
from tests.support.worker import HOST, RELEASE, Closed, Job, Outcome

T = TypeVar("T")
Environment = Callable[[int], Mapping[str, str]] | Sequence[Mapping[str, str]]

GRACE_S = 5.0  # after the first failure, how long the other ranks may take to end
CLOSE_S = 30.0  # destroying the group and getting ready for the next run


class RemoteError(RuntimeError):
    """An exception of a rank that could not be pickled; the message names its type."""


class WorkerDiedError(RuntimeError):
    """A process ended in the middle of a run."""


class Pool:
    """Up to ``max_workers`` gloo processes, started when first needed and replaced when they hang or die."""

    def __init__(self, max_workers: int = 4, warning_filters: Sequence[str] = ("error",)) -> None:
        self.max_workers = max_workers
        self._warning_filters = list(warning_filters)
        self._store: dist.TCPStore | None = None
        self._workers: list[WorkerProcess | None] = [None] * max_workers
        self._names = itertools.count()

    def __enter__(self) -> Self:
        """Nothing is started yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all processes."""
        self.close()

    def run(
        self,
        world_size: int,
        fn: Callable[..., T],
        *args: Any,
        timeout: float = 300.0,
        group_timeout: float = 120.0,
        env: Environment | None = None,
    ) -> list[T]:
        """Run ``fn(rank, *args)`` on ``world_size`` processes and return the results in rank order.

        The earliest exception of any rank is raised here: as its own type if it can be pickled, else as
        `RemoteError`; the traceback of the rank is attached as a note.

        Args:
            world_size: Number of ranks, at most ``max_workers``.
            fn: A function at module level.
            *args: Picklable arguments.
            timeout: Seconds after which processes that still run are killed.
            group_timeout: Timeout of the process group and its store.
            env: Environment variables per rank, restored afterwards; RANK and the like are not set otherwise.

        Returns:
            What each rank returned.

        Raises:
            TimeoutError: A rank still ran after ``timeout``; the message holds its stacks.
            WorkerDiedError: The process of a rank ended.
        """
        run = _Run(self, world_size, fn, args, timeout, group_timeout, env, stop_on_error=True)
        run.execute()
        if run.errors:
            raise min(run.errors.values(), key=lambda failure: failure[0])[1]
        return [run.results[rank] for rank in range(world_size)]

    def run_all(
        self,
        world_size: int,
        fn: Callable[..., T],
        *args: Any,
        timeout: float = 300.0,
        group_timeout: float = 120.0,
        env: Environment | None = None,
    ) -> list[T | BaseException]:
        """Like `run`, but return each rank's result or exception: for errors expected on every rank.

        A failed rank does not cut short the others: they have until ``timeout``.
        """
        run = _Run(self, world_size, fn, args, timeout, group_timeout, env, stop_on_error=False)
        run.execute()
        errors = {rank: error for rank, (_, error) in run.errors.items()}
        outcomes = {**run.results, **errors}
        return [outcomes[rank] for rank in range(world_size)]

    def close(self) -> None:
        """End all processes; a later run starts new ones."""
        for rank, worker in enumerate(self._workers):
            if worker is not None:
                worker.hang_up()
                self._workers[rank] = None
        self._store = None

    def _take(self, world_size: int) -> list[WorkerProcess]:
        """The first ``world_size`` workers, all of them alive and idle."""
        if not 1 <= world_size <= self.max_workers:
            raise ValueError(f"world_size={world_size}; this pool has 1 to {self.max_workers} processes")
        if self._store is None:
            self._store = dist.TCPStore(
                HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=START_S)
            )
        fresh = []
        for rank in range(world_size):
            worker = self._workers[rank]
            if worker is None or not worker.process.is_alive():
                worker = WorkerProcess(self._store.port, self._warning_filters)
                self._workers[rank] = worker
                fresh.append(worker)
        for worker in fresh:
            worker.await_ready()
        return [worker for worker in self._workers[:world_size] if worker is not None]

    def _drop(self, rank: int) -> None:
        worker = self._workers[rank]
        if worker is not None:
            worker.kill()
            self._workers[rank] = None


class _Run:
    """One run: hand out the jobs, collect the outcomes, release, and leave only idle workers behind."""

    def __init__(
        self,
        pool: Pool,
        world_size: int,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        timeout: float,
        group_timeout: float,
        env: Environment | None,
        *,
        stop_on_error: bool,
    ) -> None:
        self.pool = pool
        self.world_size = world_size
        self.payload = pickle.dumps((fn, args))
        self.timeout = timeout
        self.group_timeout = group_timeout
        self.env = env
        self.stop_on_error = stop_on_error
        self.results: dict[int, Any] = {}
        self.errors: dict[int, tuple[float, BaseException]] = {}
        self.busy: set[int] = set()  # ranks whose worker is not known to be idle

    def execute(self) -> None:
        workers = self.pool._take(self.world_size)
        name = f"run{next(self.pool._names)}"
        try:
            for rank, worker in enumerate(workers):
                self.busy.add(rank)
                worker.connection.send_bytes(pickle.dumps(self._job(name, rank)))
            self._collect(workers)
            self._release(workers)
        finally:  # also when the test was interrupted from outside
            for rank in self.busy:
                self.pool._drop(rank)

    def _job(self, name: str, rank: int) -> Job:
        environment = {} if self.env is None else self.env(rank) if callable(self.env) else self.env[rank]
        return Job(
            name=name,
            rank=rank,
            world_size=self.world_size,
            payload=self.payload,
            environment=environment,
            path=sys.path,
            group_timeout=self.group_timeout,
        )

    def _collect(self, workers: list[WorkerProcess]) -> None:
        """Take one outcome per rank; a rank that is late or dead has an error for an outcome and loses its process."""
        pending = {worker.connection: rank for rank, worker in enumerate(workers)}
        deadline = time.monotonic() + self.timeout
        while pending and (ready := wait(list(pending), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = pending.pop(connection)  # type: ignore[call-overload]  # one of the connections waited for
                data = _receive(workers[rank].connection)
                if data is None:
                    self._lose(rank, self._died(rank, workers[rank]))
                else:
                    self._take_outcome(rank, pickle.loads(data))
            if self.errors and self.stop_on_error:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        for rank in pending.values():
            message = f"rank {rank} of {self.world_size} still ran after {self.timeout} s:\n{workers[rank].dump()}"
            self._lose(rank, TimeoutError(message))

    def _release(self, workers: list[WorkerProcess]) -> None:
        """Let the remaining ranks destroy their groups."""
        remaining = sorted(self.busy)
        for rank in remaining:
            workers[rank].connection.send_bytes(RELEASE)
        deadline = time.monotonic() + CLOSE_S
        for rank in remaining:
            connection = workers[rank].connection
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                message = f"rank {rank} of {self.world_size} could not destroy its group:\n{workers[rank].dump()}"
                self._lose(rank, TimeoutError(message))
            elif (data := _receive(connection)) is None:
                self._lose(rank, self._died(rank, workers[rank]))
            else:
                self.busy.remove(rank)
                closed: Closed = pickle.loads(data)
                if closed.trace:
                    message = f"rank {rank} of {self.world_size} failed to destroy its group:\n{closed.trace}"
                    self._fail(rank, time.monotonic(), RemoteError(message))

    def _take_outcome(self, rank: int, outcome: Outcome) -> None:
        if outcome.result is not None:
            self.results[rank] = pickle.loads(outcome.result)
            return
        error = RemoteError(outcome.summary) if outcome.error is None else pickle.loads(outcome.error)
        error.add_note(f"\nRaised on rank {rank} of {self.world_size}:\n{outcome.trace}")
        self._fail(rank, outcome.at, error)

    def _died(self, rank: int, worker: WorkerProcess) -> WorkerDiedError:
        worker.process.join(1)
        return WorkerDiedError(f"rank {rank} of {self.world_size} died with exit code {worker.process.exitcode}")

    def _lose(self, rank: int, error: BaseException) -> None:
        # when a process died nobody knows, but what the other ranks then report is the consequence
        at = -math.inf if isinstance(error, WorkerDiedError) else time.monotonic()
        self._fail(rank, at, error)
        self.pool._drop(rank)
        self.busy.remove(rank)

    def _fail(self, rank: int, at: float, error: BaseException) -> None:
        self.results.pop(rank, None)
        self.errors.setdefault(rank, (at, error))


def _receive(connection: Connection) -> bytes | None:
    """The next message, or None if the process has gone."""
    try:
        return connection.recv_bytes()
    except (EOFError, ConnectionError):
        return None
