"""All-reduces among ranks of one host through shared memory, without helper threads and sockets.

A gloo collective runs in gloo's threads, which wake up late if ranks keep all cores busy: it takes 0.2 ms alone, and
about 1 ms in a training step. Here the rank itself writes its vector and polls for the others'.

Every rank holds a lock on its byte of the segment's file as long as it lives. This distinguishes a rank that has ended,
however it ended, from one that is late.
"""

from __future__ import annotations

import fcntl
import json
import logging
import mmap
import os
import struct
import weakref
from ctypes import CDLL, addressof, c_char
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

from distnorm.kernels.native import library
from distnorm.transport.direct import CAPACITY, SPIN_S, Declined, Direct, Turn, logger
from distnorm.transport.patience import LOOK_S, Patience
from distnorm.transport.rendezvous import all_gather_text

LINE = 64  # bytes, as in exchange.c


class SharedMemory(Direct):
    """A memory segment that the ranks of a group share. Each rank maps it at its own address."""

    over_network: ClassVar[bool] = False

    def __init__(self, file: int, ranks: tuple[int, ...], place: int, timeout: timedelta, compiled: CDLL) -> None:
        """Map the open ``file`` as rank number ``place`` of ``ranks``, and take this rank's lock."""
        super().__init__(ranks, place, timeout)
        self._file = file
        self._close = weakref.finalize(self, os.close, file)
        self._close.atexit = False  # the lock tells others that this process is alive, so it is held to the end
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        self._map = mmap.mmap(file, segment_bytes(len(ranks)))
        self._segment = addressof(c_char.from_buffer(self._map))
        self._compiled = compiled

    def post(self, turn: Turn) -> None:
        """Write the vector, then the turn."""
        place, size = self._place, len(self._ranks)
        self._compiled.exchange_post(
            *(self._segment, place, size, CAPACITY, turn.number, turn.who.number),
            *(turn.payload.data_ptr(), turn.payload.numel()),
        )

    def posted(self, turn: Turn) -> bool:
        """Return whether the turn is written."""
        written: int = struct.unpack_from("Q", self._map, self._place * LINE)[0]
        return written >= turn.number

    def finish(self, turn: Turn) -> bool:
        """Poll for the turns of all ranks, and add in rank order."""
        size, number = len(self._ranks), turn.number
        late = self._compiled.exchange_await(self._segment, size, number, SPIN_S, LOOK_S)
        if late >= 0:
            self._await_late(late, number)
        place: int = self._compiled.exchange_add(
            *(self._segment, size, CAPACITY, number, turn.who.number, turn.sum.data_ptr(), turn.sum.numel())
        )
        return place < 0

    def gone(self) -> int | None:
        """Return the place of a rank that holds no lock."""
        others = (place for place in range(len(self._ranks)) if place != self._place)
        return next((place for place in others if not self._lives(place)), None)

    def close(self) -> None:
        """Release this rank's lock."""
        self._close()

    def _await_late(self, late: int, number: int) -> None:
        patience = Patience(self._timeout)
        while late >= 0:
            gone = not self._lives(late)
            if gone and self._compiled.exchange_await(self._segment, late + 1, number, 0, 0) == late:
                raise self.ended(late)
            if not patience.look():
                raise self.timed_out(late)
            late = self._compiled.exchange_await(self._segment, len(self._ranks), number, 0, LOOK_S)

    def _lives(self, place: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError:
            return True
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)
        return False


def segment_bytes(size: int) -> int:
    """Return the size of the segment of ``size`` ranks."""
    return size * (LINE + 2 * CAPACITY * 8)


def join(ranks: tuple[int, ...], rank: int, timeout: timedelta) -> SharedMemory | None:
    """Return the segment of ``ranks``; None on all of them if one cannot take part. Collective, as ``attempt``."""
    found = attempt(ranks, rank, timeout)
    if not isinstance(found, Declined):
        return found
    found.log("distnorm: ranks %s cannot share memory: %s", ranks)
    return None


def attempt(ranks: tuple[int, ...], rank: int, timeout: timedelta) -> SharedMemory | Declined:
    """Return the segment of ``ranks``, or on all of them why there is none.

    Collective over ``ranks``: they exchange their hosts and the outcome through the job's store.

    Raises:
        RuntimeError: some ranks have ended, or are late; the message names them.
    """
    patience, place = Patience(timeout), ranks.index(rank)

    def gather_text(what: str, doing: str) -> list[str]:
        return all_gather_text(ranks, what, patience.rest(), doing=doing)

    compiled = library()
    hosts = gather_text("" if compiled is None else host_id(), "say which host they are on")
    if compiled is None or not all(hosts):
        without = [rank for rank, host in zip(ranks, hosts, strict=True) if not host]
        return Declined(f"ranks {without} have no compiled kernels, or no /proc that names their host", logging.INFO)
    if len(set(hosts)) > 1:
        on = {host: [r for r, each in zip(ranks, hosts, strict=True) if each == host] for host in hosts}
        apart = " and ".join(map(str, on.values()))
        return Declined(f"ranks {apart} are on different hosts, or in containers of their own", logging.INFO)
    offered = _offer(segment_bytes(len(ranks))) if place == 0 else ""
    path = gather_text(json.dumps(_path_of(offered)), "offer shared memory")[0]
    joined = _attach(offered, json.loads(path), ranks, place, timeout, compiled)
    causes = gather_text("" if isinstance(joined, SharedMemory) else joined, "open shared memory")
    if isinstance(joined, SharedMemory) and not any(causes):
        return joined
    return Declined.by_rank(ranks, causes)


# docs/decisions.md#shared-memory-belongs-to-one-host-and-leaves-nothing-behind
def host_id() -> str:
    """Return an identifier of the host: its kernel's boot, and its network and process namespaces, for containers.

    Empty if the system does not provide it.
    """
    try:
        spaces = [os.readlink(f"/proc/self/ns/{each}") for each in ("net", "pid")]
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + "".join(spaces)
    except OSError as error:
        logger.info("distnorm: this host cannot be identified, so memory is not shared: %s", error)
        return ""


def _offer(nbytes: int) -> int | str:
    """Create a file for the segment, or return why that failed.

    The file has no name and is freed with the last process that holds it, however that ends.
    """
    try:
        file = os.memfd_create("distnorm")
    except OSError as error:
        return str(error)
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        os.close(file)
        return str(error)
    return file


def _path_of(offered: int | str) -> tuple[str, str]:
    """Return where other ranks find the file, or why there is none."""
    return ("", offered) if isinstance(offered, str) else (f"/proc/{os.getpid()}/fd/{offered}", "")


def _attach(
    offered: int | str, told: tuple[str, str], ranks: tuple[int, ...], place: int, timeout: timedelta, compiled: CDLL
) -> SharedMemory | str:
    path, why_not = told
    if not path:
        return f"rank {ranks[0]} could not create shared memory, {why_not}"
    try:
        # The rank that offers uses its own descriptor: closing another one would release all its locks.
        file = offered if isinstance(offered, int) else os.open(path, os.O_RDWR | os.O_CLOEXEC)
        return SharedMemory(file, ranks, place, timeout, compiled)
    except OSError as error:
        return str(error)
