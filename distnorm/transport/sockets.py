"""Sums among ranks of several hosts over sockets of our own: one message each way, sent without asking.

A message of gloo's takes a round trip, since the receiver announces its buffer first, and two threads that wake up.
Here every rank writes its vector to all others at once and reads theirs as they come: half a round trip.

A message: turn and number of values, each 8 bytes, then the values.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from ctypes import c_char
from datetime import timedelta

import torch
from torch import Tensor

from distnorm.transport.direct import AWAKE_S, LOOK_S, Direct
from distnorm.transport.rendezvous import tell_and_collect

logger = logging.getLogger("distnorm")

MOST_RANKS = 64
"""More ranks would open, and write to, more sockets than is worth it."""

CONNECT_S = 5.0
"""How long a rank tries to reach another before all do without."""

HEADER = 2  # values
_HELLO = struct.Struct("!16sI")  # the listener's secret, and who calls


class Sockets(Direct):
    """A connection to every other rank of a group."""

    def __init__(self, peers: dict[int, socket.socket], ranks: tuple[int, ...], place: int, timeout: timedelta) -> None:
        """``peers``: connections by place in ``ranks``, of which this one is number ``place``."""
        super().__init__()
        self._peers, self._ranks, self._place, self._timeout = peers, ranks, place, timeout
        self._unsent: dict[int, memoryview] = {}
        for connection in peers.values():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)

    def post(self, wire: Tensor) -> None:
        """Write to all that take it; the rest of a message goes out while others are read."""
        count = wire.numel()
        self._messages = torch.empty(len(self._ranks), HEADER + count, dtype=torch.float64, device="cpu")
        mine = self._messages[self._place]
        mine[:HEADER].view(torch.int64).copy_(torch.tensor([self.turn, count], device="cpu"))
        mine[HEADER:].copy_(wire.view(-1))
        whole = _bytes_of(mine)
        self._unsent = dict.fromkeys(self._peers, whole)
        self._unread = {place: _bytes_of(self._messages[place]) for place in self._peers}
        self._write()

    def finish(self, total: Tensor) -> None:
        """Read what the others have written."""
        started = time.monotonic()
        while self._unread or self._unsent:
            if self._read() or self._write():
                continue
            waited = time.monotonic() - started
            if waited > self._timeout.total_seconds():
                late = self._ranks[next(iter(self._unread or self._unsent))]
                raise RuntimeError(f"rank {late} did not take part within {self._timeout.total_seconds():.0f} s.")
            if waited < AWAKE_S:
                os.sched_yield()
            else:
                self._sleep()
        torch.sum(self._messages[:, HEADER:], 0, out=total.view(-1))
        self._under_way = None

    def _sleep(self) -> None:
        """Until something can be read or written, or for a while."""
        poller = select.poll()
        for place, connection in self._peers.items():
            wanted = select.POLLIN * (place in self._unread) | select.POLLOUT * (place in self._unsent)
            if wanted:
                poller.register(connection, wanted)
        poller.poll(LOOK_S * 1e3)

    def close(self) -> None:
        """Close all connections."""
        for connection in self._peers.values():
            connection.close()

    def _write(self) -> bool:
        """Write what can be written; whether anything was."""
        before = sum(map(len, self._unsent.values()))
        for place, rest in list(self._unsent.items()):
            try:
                rest = rest[self._peers[place].send(rest) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._ended(place) from error
            self._unsent[place] = rest
            if not rest:
                del self._unsent[place]
        return sum(map(len, self._unsent.values())) < before

    def _read(self) -> bool:
        """Read what has come; whether anything has."""
        progress = False
        for place, rest in list(self._unread.items()):
            try:
                count = self._peers[place].recv_into(rest)
            except BlockingIOError:
                continue
            except OSError as error:
                raise self._ended(place) from error
            if not count:
                raise self._ended(place)
            progress = True
            self._unread[place] = rest[count:]
            if len(rest) == count:
                del self._unread[place]
            self._check(place, len(rest) - count)
        return progress

    def _check(self, place: int, missing: int) -> None:
        """Refuse a message of another length as soon as its header is there: reading on would never end."""
        if self._messages[place].numel() * 8 - missing < HEADER * 8:
            return
        turn, count = self._messages[place, :HEADER].view(torch.int64).tolist()
        expected = self._messages.shape[1] - HEADER
        if (turn, count) != (self.turn, expected):
            raise RuntimeError(f"rank {self._ranks[place]} sent another number of values than {expected}.")

    def _ended(self, place: int) -> RuntimeError:
        return RuntimeError(f"rank {self._ranks[place]} has ended.")


def _bytes_of(row: Tensor) -> memoryview:
    """The memory of a contiguous tensor; valid as long as the tensor is."""
    return memoryview((c_char * (row.numel() * row.element_size())).from_address(row.data_ptr())).cast("B")


def join(ranks: tuple[int, ...], rank: int, timeout: timedelta) -> Sockets | None:
    """Connections among ``ranks``; None on all of them if one cannot be reached.

    Collective over ``ranks``: they tell each other through the job's store where they listen, and whether it worked.
    """
    if len(ranks) > MOST_RANKS:
        return None
    place = ranks.index(rank)
    with _listen(len(ranks)) as listener:
        secret = secrets.token_hex(8)
        mine = None if listener is None else (own_address(), listener.getsockname()[1], secret)
        told = [json.loads(text) for text in tell_and_collect(ranks, json.dumps(mine), timeout)]
        if listener is None or None in told:
            return None
        peers: dict[int, socket.socket] = {}
        try:
            _connect(peers, listener, told, place)
        except OSError as error:
            logger.info("distnorm: ranks %s cannot all connect, so gloo carries their statistics: %s", ranks, error)
    worked = len(peers) == len(ranks) - 1
    if all(tell_and_collect(ranks, "joined" if worked else "", timeout)):
        return Sockets(peers, ranks, place, timeout)
    for connection in peers.values():
        connection.close()
    return None


def _listen(backlog: int) -> AbstractContextManager[socket.socket | None]:
    try:
        return socket.create_server(("", 0), family=socket.AF_INET, backlog=backlog)
    except OSError as error:
        logger.info("distnorm: no socket to listen on, so gloo carries the statistics: %s", error)
        return nullcontext()


def own_address() -> str:
    """Where other hosts reach this one: the interface that gloo is told to use, or the way to the job's master."""
    if name := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        return _interface_address(name)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ.get("MASTER_ADDR", "localhost"), 9))  # sends nothing
            address = str(probe.getsockname()[0])
            return socket.gethostbyname(socket.gethostname()) if address.startswith("127.") else address
        except OSError:
            return "127.0.0.1"


def _interface_address(name: str) -> str:
    import fcntl  # of Unix only

    get_interface_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, get_interface_address, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return "127.0.0.1"
    return socket.inet_ntoa(answer[20:24])


def _connect(
    peers: dict[int, socket.socket], listener: socket.socket, told: Sequence[Sequence[str]], place: int
) -> None:
    """Call the ranks before this one, and answer those after it."""
    for other, (address, port, secret) in enumerate(told[:place]):
        peers[other] = socket.create_connection((address, port), timeout=CONNECT_S)
        peers[other].sendall(_HELLO.pack(secret.encode(), place))
    listener.settimeout(2 * CONNECT_S)
    while len(peers) < len(told) - 1:
        connection, _ = listener.accept()
        connection.settimeout(CONNECT_S)
        hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
        secret, other = _HELLO.unpack(hello) if len(hello) == _HELLO.size else (b"", -1)
        if secret == told[place][2].encode() and other > place:
            peers[other] = connection
        else:
            connection.close()  # a stranger
