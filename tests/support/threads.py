"""Ranks as threads of this process: milliseconds per run, so that property tests can afford hundreds.

This is the only file that touches torch's private threaded process group.

Threads share the process: ``torch.manual_seed``, the default dtype, warning filters and ``os.environ`` are common to
all ranks. Give each rank its own ``torch.Generator``; a test that needs an environment per rank belongs in the pool.
"""

from __future__ import annotations

import ctypes
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch._C._distributed_c10d import _set_thread_isolation_mode  # type: ignore[attr-defined]  # missing in the stub
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.multi_threaded_pg import (
    ProcessLocalGroup,
    ThreadLocalWorld,
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

T = TypeVar("T")

if not hasattr(ThreadLocalWorld, "comms"):
    setattr(ThreadLocalWorld, "comms", [])  # noqa: B010, torch 2.11 looks at it when a group is destroyed, and forgot it

GRACE_S = 5.0  # after the first failure, how long the other ranks may take to end


def run_threads(world_size: int, fn: Callable[..., T], *args: Any, timeout: float = 30.0) -> list[T]:
    """Run ``fn(rank, *args)`` on ``world_size`` threaded ranks and return the results in rank order.

    Each rank has a default process group of its own to use. The first exception of any rank is raised here, as the
    same object with its traceback; the ranks that wait for the failed one are released.

    Args:
        world_size: Number of ranks.
        fn: Called as ``fn(rank, *args)`` on every rank; the arguments are shared, not copied.
        *args: Passed on to ``fn``.
        timeout: Seconds after which the run is given up, also the timeout of the process groups.

    Returns:
        What each rank returned.

    Raises:
        TimeoutError: A rank did not end in time; the message holds the stacks of all such ranks.
    """
    run = _Run(world_size, fn, args, timeout, stop_on_error=True)
    stuck = run.execute()
    if run.errors:
        error = next(iter(run.errors.values()))
        if stuck:
            error.add_note(f"Ranks {sorted(stuck)} had to be given up:\n{''.join(stuck.values())}")
        raise error
    if stuck:
        raise TimeoutError(
            f"Ranks {sorted(stuck)} of {world_size} still ran after {timeout} s:\n{''.join(stuck.values())}"
        )
    return [run.results[rank] for rank in range(world_size)]


def run_threads_all(
    world_size: int, fn: Callable[..., T], *args: Any, timeout: float = 30.0
) -> list[T | BaseException]:
    """Like `run_threads`, but return each rank's result or exception: for errors expected on every rank.

    A failed rank does not release the others. A rank that is still waiting after ``timeout`` has a `TimeoutError` with
    its stack as its outcome.
    """
    run = _Run(world_size, fn, args, timeout, stop_on_error=False)
    stuck = run.execute()
    late = {rank: TimeoutError(f"Rank {rank} still ran after {timeout} s:\n{stack}") for rank, stack in stuck.items()}
    outcomes = {**run.results, **run.errors, **late}
    return [outcomes[rank] for rank in range(world_size)]


class _Run:
    """One run: its threads, what they returned, and what they raised in the order of failure."""

    def __init__(
        self, world_size: int, fn: Callable[..., Any], args: tuple[Any, ...], timeout: float, *, stop_on_error: bool
    ) -> None:
        self.world_size = world_size
        self.fn = fn
        self.args = args
        self.timeout = timeout
        self.stop_on_error = stop_on_error
        self.results: dict[int, Any] = {}
        self.errors: dict[int, BaseException] = {}
        self.over = False
        self._ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._store = dist.HashStore()

    def execute(self) -> dict[int, str]:
        """Run all ranks; return the stacks of those that had to be given up."""
        threads = [
            threading.Thread(target=self._rank, args=(rank,), name=f"rank {rank}", daemon=True)
            for rank in range(self.world_size)
        ]
        _install_threaded_pg()
        _set_thread_isolation_mode(True)
        try:
            for thread in threads:
                thread.start()
            running = self._wait()
            stuck = {rank: _stack(threads[rank]) for rank in running}
        finally:
            self.over = True
            _give_up(threads)
            ProcessLocalGroup.reset()
            _set_thread_isolation_mode(False)
            _uninstall_threaded_pg()
            # One attribute of the class for all threads: the last forward pass to end may restore another rank's.
            DistributedDataParallel._active_ddp_module = None
        return stuck

    def _wait(self) -> set[int]:
        running = set(range(self.world_size))
        deadline = time.monotonic() + self.timeout
        while running:
            try:
                running.remove(self._ended.get(timeout=max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                break
            if self.errors and self.stop_on_error:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        return running

    def _rank(self, rank: int) -> None:
        try:
            dist.init_process_group(
                "threaded",
                rank=rank,
                world_size=self.world_size,
                store=self._store,
                timeout=timedelta(seconds=self.timeout),
            )
            self.results[rank] = self.fn(rank, *self.args)
        except BaseException as error:
            self._fail(rank, error)
        finally:
            if not self.over and dist.is_initialized():
                dist.destroy_process_group()
            self._ended.put(rank)

    def _fail(self, rank: int, error: BaseException) -> None:
        if self.over:
            return
        released = isinstance(error, SystemExit) and self.stop_on_error and bool(self.errors)
        error.add_note(f"Raised on threaded rank {rank} of {self.world_size}.")
        self.errors[rank] = error
        if self.stop_on_error and not released:
            _release(error)


def _release(error: BaseException) -> None:
    """End every rank that waits in a collective: it raises SystemExit there."""
    with ProcessLocalGroup._coll_lock:  # the helper iterates over the collectives under way
        ProcessLocalGroup.exception_handle(error)


def _give_up(threads: list[threading.Thread]) -> None:
    """End the threads that still run, so that none wakes up in the middle of a later run."""
    alive = [thread for thread in threads if thread.is_alive()]
    if not alive:
        return
    _release(TimeoutError())
    _join(alive, 0.2)
    for thread in alive:
        if thread.is_alive():  # not in a collective: raise SystemExit at its next bytecode
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
    _join(alive, 0.2)


def _join(threads: list[threading.Thread], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return f"--- {thread.name}\n{''.join(traceback.format_stack(frame))}" if frame else f"--- {thread.name}: ended\n"
