"""One process of the pool: runs one function after another, each as a rank of a fresh gloo group.

Conversation with the pool, all of it pickled bytes: `Job` comes in, `Outcome` goes out, `RELEASE` comes in once every
rank is done or one has failed, the group is destroyed, and `Closed` goes out. A rank that succeeded keeps its
connections until the release, so that it cannot cut off a slower one; a rank that failed closes them at once, so that
the others notice.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

HOST = "127.0.0.1"
READY = b"ready"
RELEASE = b"release"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What one rank shall do; ``payload`` is the pickled ``(fn, args)``, opened under the rank's environment."""

    name: str
    rank: int
    world_size: int
    payload: bytes
    environment: Mapping[str, str]
    path: Sequence[str]
    group_timeout: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A pickled result, or an exception: pickled if that works, and as text; ``at`` is the time of the failure."""

    result: bytes | None = None
    error: bytes | None = None
    summary: str = ""
    trace: str = ""
    at: float = 0.0


@dataclass(frozen=True)
class Closed:
    """The group is destroyed and the process idle; ``trace`` tells what went wrong in doing so."""

    trace: str = ""


def serve(connection: Connection, port: int, warning_filters: Sequence[str], stacks: str) -> None:
    """Work until the pool hangs up.

    Args:
        connection: The pool's end is the other one.
        port: Where the pool's key-value store listens.
        warning_filters: Lines in pytest's ``filterwarnings`` form.
        stacks: File that receives all stacks on SIGUSR1.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the pool, which then ends its processes
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    torch.set_num_threads(1)
    _filter_warnings(warning_filters)  # for what is done before the first job
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        gc.freeze()  # what is imported by now stays: keep it out of the collection after every run
        store = _connect(port)
        connection.send_bytes(READY)
        while True:
            try:
                job = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            _filter_warnings(warning_filters)  # anew: a job that is interrupted in catch_warnings restores none
            store = _work(connection, job, store, port)


def _connect(port: int) -> dist.TCPStore:
    """A client of the pool's store, kept from run to run: connecting may look up the name of the peer, slowly."""
    return dist.TCPStore(HOST, port, is_master=False)


def _work(connection: Connection, job: Job, store: dist.TCPStore, port: int) -> dist.TCPStore:
    """Do one job; return the store for the next one."""
    with _environment(job):
        outcome = _outcome(job, store)
        closed = _close() if outcome.result is None else None
        connection.send_bytes(pickle.dumps(outcome))
        connection.recv_bytes()  # RELEASE
        closed = closed or _close()
        if outcome.result is None:
            store = _connect(port)  # the failure may have come in the middle of a request
        connection.send_bytes(pickle.dumps(closed))
    return store


def _outcome(job: Job, store: dist.TCPStore) -> Outcome:
    try:
        fn, args = pickle.loads(job.payload)
        _join_group(job, store)
        torch.manual_seed(0)  # what ran here before must not matter
        return Outcome(result=pickle.dumps(fn(job.rank, *args)))
    except BaseException as error:
        at = time.monotonic()
        trace = "".join(traceback.format_exception(error))
        summary = f"{type(error).__qualname__}: {error}"
        return Outcome(error=_pickled(error), summary=summary, trace=trace, at=at)


def _join_group(job: Job, store: dist.TCPStore) -> None:
    timeout = timedelta(seconds=job.group_timeout)
    store.set_timeout(timeout)
    dist.init_process_group(
        "gloo", rank=job.rank, world_size=job.world_size, store=dist.PrefixStore(job.name, store), timeout=timeout
    )
    # Gloo connects rank by rank: one that failed at once would cut off another that is not connected yet.
    store.set(f"{job.name}/joined/{job.rank}", "")
    store.wait([f"{job.name}/joined/{rank}" for rank in range(job.world_size)], timeout)


def _close() -> Closed:
    try:
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # groups still referenced from a cycle keep their sockets and threads
    except BaseException:
        return Closed(traceback.format_exc())
    return Closed()


def _pickled(error: BaseException) -> bytes | None:
    """The exception as bytes, or None if it does not survive the way."""
    try:
        data = pickle.dumps(error)
        pickle.loads(data)
    except Exception:
        return None
    return data


@contextmanager
def _environment(job: Job) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(job.environment)
    sys.path[:] = job.path  # the modules of the tests, wherever the pool found them
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _filter_warnings(lines: Sequence[str]) -> None:
    """Apply lines of the form ``action:message:category:module:lineno``; message and module are regular expressions."""
    warnings.resetwarnings()
    for line in lines:
        action, message, category, module, lineno = [*line.split(":"), "", "", "", ""][:5]
        warnings.filterwarnings(
            action,  # type: ignore[arg-type]  # one of the literals, or filterwarnings says so
            message=message.strip(),
            category=_category(category.strip()),
            module=module.strip(),
            lineno=int(lineno or 0),
        )


def _category(name: str) -> type[Warning]:
    module, _, attribute = name.rpartition(".")
    category: type[Warning] = getattr(importlib.import_module(module or "builtins"), attribute or "Warning")
    return category
