"""All-reduces among ranks of several hosts over sockets: one message each way, sent without a request.

A gloo message takes a round trip, since the receiver announces its buffer first, and it wakes two threads. Here every
rank writes its vector to all others at once and reads theirs as they arrive: half a round trip.

A message: turn, number of values and sender, each 8 bytes, then the values.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import socket
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from ctypes import c_char
from datetime import timedelta
from weakref import WeakSet

import torch
from torch import Tensor

from distnorm.transport.addresses import family_of, own_address
from distnorm.transport.direct import CAPACITY, SPIN_S, Declined, Direct, Turn
from distnorm.transport.handshake import SECRET, Endpoint, Handshake, UnreachableError
from distnorm.transport.patience import LOOK_S, Patience
from distnorm.transport.rendezvous import all_gather_text
from distnorm.transport.senders import Sender

MOST_RANKS = 64
"""The largest number of ranks; more would need too many sockets and writes."""

CONNECT_S = 5.0
"""How long ranks try to connect, in seconds, before all use gloo."""

HEADER = 3  # values


class _SocketTurn(Turn):
    """A turn, and the progress of its messages."""

    def __init__(self, number: int, payload: Tensor, who: Sender, ranks: int, place: int) -> None:
        """Start messages to and from all ``ranks`` except number ``place``, which is this one."""
        super().__init__(number, payload, who)
        count = payload.numel()
        self.rows = torch.empty(ranks, HEADER + count, dtype=torch.float64, device="cpu")
        mine = self.rows[place]
        mine[:HEADER].view(torch.int64).copy_(torch.tensor([number, count, who.number], device="cpu"))
        mine[HEADER:].copy_(self.payload.view(-1))
        whole = _bytes_of(mine)
        others = [other for other in range(ranks) if other != place]
        self.unsent = dict.fromkeys(others, whole)
        self.unread = {other: _bytes_of(self.rows[other, :HEADER]) for other in others}
        self.values_of: dict[int, Tensor] = {}
        """By rank whose header has arrived, the tensor for its values."""
        self.alike = True
        self.untouched = True


class Sockets(Direct):
    """A connection to every other rank of a group."""

    def __init__(self, peers: dict[int, socket.socket], ranks: tuple[int, ...], place: int, timeout: timedelta) -> None:
        """``peers``: connections by place in ``ranks``, of which this one is number ``place``."""
        super().__init__(ranks, place, timeout)
        self._peers = peers
        self._torn = False
        for connection in peers.values():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
        _in_use.add(self)

    def _open(self, number: int, payload: Tensor, who: Sender) -> Turn:
        return _SocketTurn(number, payload, who, len(self._ranks), self._place)

    def post(self, turn: Turn) -> None:
        """Write to all ranks whose sockets accept it. The rest of a message is sent while others are read."""
        assert isinstance(turn, _SocketTurn)
        self._write(turn)

    def posted(self, turn: Turn) -> bool:
        """Return whether a byte has been sent."""
        return not isinstance(turn, _SocketTurn) or not turn.untouched

    def finish(self, turn: Turn) -> bool:
        """Read the messages of the other ranks completely, so that the next message starts where this one ends."""
        assert isinstance(turn, _SocketTurn)
        started, patience = time.monotonic(), Patience(self._timeout)
        while turn.unread or turn.unsent:
            if self._read(turn) or self._write(turn):
                continue
            if not patience.look():
                raise self.timed_out(next(iter(turn.unread or turn.unsent)))
            if time.monotonic() - started < SPIN_S:
                os.sched_yield()
            else:
                self._sleep(turn)
        if turn.alike:
            torch.sum(turn.rows[:, HEADER:], 0, out=turn.sum.view(-1))
        return turn.alike

    def _sleep(self, turn: _SocketTurn) -> None:
        """Sleep until a socket can be read or written, at most ``LOOK_S`` seconds."""
        poller = select.poll()
        for place, connection in self._peers.items():
            wanted = select.POLLIN * (place in turn.unread) | select.POLLOUT * (place in turn.unsent)
            if wanted:
                poller.register(connection, wanted)
        poller.poll(LOOK_S * 1e3)

    def gone(self) -> int | None:
        """Return the place of a rank that has closed its end of the connection, or whose host has said so."""
        for place, connection in self._peers.items():
            poller = select.poll()
            poller.register(connection, select.POLLRDHUP)
            if poller.poll(0):
                return place
        return None

    def close(self) -> None:
        """Close all connections."""
        for connection in self._peers.values():
            connection.close()

    def _write(self, turn: _SocketTurn) -> bool:
        """Write what can be written; return whether anything was."""
        progress = False
        for place in list(turn.unsent):
            turn.untouched = False
            progress |= self._advance(place, turn.unsent, self._peers[place].send) > 0
        return progress

    def _read(self, turn: _SocketTurn) -> bool:
        """Read what has arrived; return whether anything has."""
        progress = False
        for place in list(turn.unread):
            progress |= self._advance(place, turn.unread, self._peers[place].recv_into) > 0
            if place not in turn.unread and place not in turn.values_of:
                turn.values_of[place] = self._room_for(place, turn)
                turn.unread[place] = _bytes_of(turn.values_of[place])
                self._advance(place, turn.unread, self._peers[place].recv_into)
        return progress

    def _advance(self, place: int, rests: dict[int, memoryview], move: Callable[[memoryview], int]) -> int:
        """Return how many bytes of the rest of a message ``move`` has moved; 0 if it would block."""
        if self._torn:
            self.close()
            raise RuntimeError("this rank was interrupted in the middle of a message, at an unknown position.")
        rest = rests[place]
        self._torn = True  # after an exception from here on, the position in the message is unknown
        try:
            count = move(rest)
        except BlockingIOError:
            self._torn = False
            return 0
        except OSError as error:
            self._torn = False
            raise self.ended(place) from error
        if count == len(rest):
            del rests[place]
        else:
            rests[place] = rest[count:]
        self._torn = False
        if not count and len(rest):
            raise self.ended(place)
        return count

    def _room_for(self, place: int, turn: _SocketTurn) -> Tensor:
        """Return the tensor for the values that a header announces: a separate one if they differ from this rank's."""
        number, count, who = turn.rows[place, :HEADER].view(torch.int64).tolist()
        if number != turn.number or not 0 < count <= CAPACITY:
            raise RuntimeError(
                f"rank {self._ranks[place]} sent turn {number} with {count} values in turn {turn.number}."
            )
        if (count, who) == (turn.payload.numel(), turn.who.number):
            return turn.rows[place, HEADER:]
        turn.alike = False
        return torch.empty(count, dtype=torch.float64, device="cpu")


_in_use: WeakSet[Sockets] = WeakSet()


def _close_copies() -> None:
    """Close the connections in a forked process. Otherwise nobody would notice the end of the rank."""
    for each in _in_use:
        each.close()


os.register_at_fork(after_in_child=_close_copies)


def _bytes_of(row: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor; valid as long as the tensor is."""
    return memoryview((c_char * (row.numel() * row.element_size())).from_address(row.data_ptr())).cast("B")


def join(ranks: tuple[int, ...], rank: int, timeout: timedelta) -> Sockets | None:
    """Return connections among ``ranks``; None on all if one cannot be reached. Collective, as ``attempt``."""
    found = attempt(ranks, rank, timeout)
    if not isinstance(found, Declined):
        return found
    found.log("distnorm: ranks %s are not connected by sockets, so gloo is used: %s", ranks)
    return None


def attempt(ranks: tuple[int, ...], rank: int, timeout: timedelta) -> Sockets | Declined:
    """Return connections among ``ranks``, or on all of them why there are none.

    Collective over ``ranks``: they exchange their addresses and the outcome through the job's store.

    Raises:
        RuntimeError: some ranks have ended, or are late; the message names them.
    """
    if len(ranks) > MOST_RANKS:
        return Declined(f"they are {len(ranks)}, more than {MOST_RANKS}", logging.INFO)
    patience, place, address = Patience(timeout), ranks.index(rank), own_address()
    listener = _listen(address)
    if isinstance(listener, str):
        mine = [listener]
    else:
        mine = [address, str(listener.getsockname()[1]), secrets.token_hex(SECRET)]
    with nullcontext() if isinstance(listener, str) else closing(listener):
        told = all_gather_text(ranks, json.dumps(mine), patience.rest(), doing="say where they listen")
        endpoints = [json.loads(text) for text in told]
        causes = ["" if len(endpoint) == 3 else endpoint[0] for endpoint in endpoints]
        if isinstance(listener, str) or any(causes):
            return Declined.by_rank(ranks, causes)
        endpoints = [Endpoint(rank, *endpoint) for rank, endpoint in zip(ranks, endpoints, strict=True)]
        handshake, cause = Handshake(listener, endpoints, place), ""
        try:
            handshake.connect(Patience(min(patience.rest(), timedelta(seconds=CONNECT_S))))
        except UnreachableError as error:
            cause = str(error)
        try:
            causes = all_gather_text(ranks, cause, patience.rest(), doing="connect")
        except BaseException:
            handshake.close()
            raise
    if not any(causes):
        return Sockets(handshake.peers, ranks, place, timeout)
    handshake.close()
    return Declined.by_rank(ranks, causes)


def _listen(address: str) -> socket.socket | str:
    """Listen on the announced interface only; return why that failed otherwise."""
    try:
        return socket.create_server((address, 0), family=family_of(address), backlog=socket.SOMAXCONN)
    except OSError as error:
        return f"cannot listen on {address}: {error}"
