"""Sums among ranks of one host through memory that they share: no kernel, no helper thread, no socket.

A gloo collective is done by threads of its own, which wake up late where ranks keep all cores busy: it takes 0.2 ms
alone, and about 1 ms in a training step. Here the rank itself writes its vector and watches for the others'.

Every rank holds a lock on its byte of the segment's file for as long as it lives. So a rank that has ended is told from
one that is late, however it ended.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import tempfile
import time
from ctypes import CDLL, addressof, c_char
from datetime import timedelta
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from distnorm.compiled import library
from distnorm.transport.direct import AWAKE_S, CAPACITY, LOOK_S, Direct
from distnorm.transport.rendezvous import tell_and_collect

logger = logging.getLogger("distnorm")

FOLDER = Path("/dev/shm")
LINE = 64  # bytes, as in exchange.c


class SharedMemory(Direct):
    """A segment that the ranks of a group share; each knows it by its own address."""

    travels: ClassVar[bool] = False

    def __init__(self, file: int, ranks: tuple[int, ...], place: int, timeout: timedelta, compiled: CDLL) -> None:
        """Map the open ``file`` as rank number ``place`` of ``ranks``, and hold this rank's lock."""
        super().__init__()
        self._file = os.fdopen(file, "r+b")
        fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        self._map = mmap.mmap(file, segment_bytes(len(ranks)))
        self._segment = addressof(c_char.from_buffer(self._map))
        self._ranks, self._place, self._timeout, self._compiled = ranks, place, timeout, compiled

    def post(self, wire: Tensor) -> None:
        """Write the vector, then the turn."""
        self._compiled.exchange_post(
            *(self._segment, self._place, len(self._ranks), CAPACITY, self.turn, wire.data_ptr(), wire.numel())
        )

    def finish(self, total: Tensor) -> None:
        """Watch for the turns of all, and add up in the order of ranks."""
        until = time.monotonic() + self._timeout.total_seconds()
        size = len(self._ranks)
        while (late := self._compiled.exchange_await(self._segment, size, self.turn, AWAKE_S, LOOK_S)) >= 0:
            self._check(late, time.monotonic() > until)
        place = self._compiled.exchange_add(self._segment, size, CAPACITY, self.turn, total.data_ptr(), total.numel())
        if place >= 0:
            raise RuntimeError(f"rank {self._ranks[place]} sent another number of values than {total.numel()}.")
        self._under_way = None

    def close(self) -> None:
        """Give up this rank's lock."""
        self._file.close()

    def _check(self, late: int, too_late: bool) -> None:
        if not self._lives(late) and self._compiled.exchange_await(self._segment, late + 1, self.turn, 0, 0) == late:
            raise RuntimeError(f"rank {self._ranks[late]} has ended.")
        if too_late:
            raise RuntimeError(
                f"rank {self._ranks[late]} did not take part within {self._timeout.total_seconds():.0f} s."
            )

    def _lives(self, place: int) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except OSError:
            return True
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, place)
        return False


def segment_bytes(size: int) -> int:
    """How large the segment of ``size`` ranks is."""
    return size * (LINE + 2 * CAPACITY * 8)


def join(ranks: tuple[int, ...], rank: int, timeout: timedelta) -> SharedMemory | None:
    """The segment of ``ranks``; None on all of them if one of them cannot take part.

    Collective over ``ranks``: they tell each other through the job's store where they are, and whether it worked.
    """
    compiled = library()

    def tell(what: str) -> list[str]:
        return tell_and_collect(ranks, what, timeout)

    if len(set(hosts := tell("" if compiled is None else host_id()))) > 1 or not all(hosts):
        return None
    assert compiled is not None
    place = ranks.index(rank)
    with _Offer(segment_bytes(len(ranks)) if place == 0 else 0) as offer:
        path = tell(offer.path)[0]
        joined = _attach(path, ranks, place, timeout, compiled)
        return joined if all(tell("" if joined is None else "joined")) else None


def host_id() -> str:
    """Names the host: the boot of its kernel, and its network, as containers and network namespaces see it.

    Nothing where the system does not tell.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/net")
    except OSError as error:
        logger.info("distnorm: this host has no name, so memory is not shared: %s", error)
        return ""


class _Offer:
    """A file for the segment, with a name until all have opened it; without one if there is no room for it."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self.path = ""

    def __enter__(self) -> _Offer:
        if self._nbytes:
            try:
                file, self.path = tempfile.mkstemp(prefix="distnorm-", dir=FOLDER)
            except OSError as error:
                logger.info("distnorm: no shared memory in %s, so gloo carries the statistics: %s", FOLDER, error)
                return self
            with os.fdopen(file, "wb"):
                self._reserve(file)
        return self

    def _reserve(self, file: int) -> None:
        try:
            os.posix_fallocate(file, 0, self._nbytes)
        except OSError as error:
            logger.info("distnorm: %s has no room for shared memory, so gloo carries: %s", FOLDER, error)
            self.__exit__()

    def __exit__(self, *_: object) -> None:
        if self.path:
            os.unlink(self.path)
            self.path = ""


def _attach(path: str, ranks: tuple[int, ...], place: int, timeout: timedelta, compiled: CDLL) -> SharedMemory | None:
    try:
        return SharedMemory(os.open(path, os.O_RDWR), ranks, place, timeout, compiled)
    except OSError as error:
        logger.info("distnorm: no shared memory with ranks %s, so gloo carries the statistics: %s", ranks, error)
        return None
