"""How ranks that have told each other addresses and secrets connect, whoever else calls meanwhile.

Who calls says the secret of the rank that it calls, and its own place; the answer is the caller's secret. Strangers
cannot know either. All connections are heard at the same time, and one that says nothing waits for nobody.
"""

from __future__ import annotations

import hmac
import selectors
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from distnorm.transport.patience import LOOK_S, Patience

SECRET = 16  # bytes
_HELLO = struct.Struct(f"!{SECRET}sI")  # the secret of the rank that is called, and who calls

SILENT_S = 2.0
"""How long a caller may take to say who it is."""

GUESTS = 256
"""How many callers may be taking their time; the oldest makes room for another."""


class UnreachableError(OSError):
    """A rank could not be reached in time; the message says which."""


class Door(NamedTuple):
    """Where a rank listens, and what a caller must know."""

    rank: int
    address: str
    port: str
    secret: str


@dataclass
class _Guest:
    """A connection on which somebody has yet to speak: rank number ``called``, or a caller if that is None."""

    connection: socket.socket
    called: int | None
    since_s: float = field(default_factory=time.monotonic)
    heard: bytes = b""


# docs/decisions.md#unknown-processes-that-connect
class Handshake:
    """This rank's part in connecting all with all."""

    def __init__(self, listener: socket.socket, doors: Sequence[Door], place: int) -> None:
        """As rank number ``place`` of those behind ``doors``."""
        self.peers: dict[int, socket.socket] = {}
        self._listener, self._doors, self._place = listener, doors, place
        self._guests: dict[socket.socket, _Guest] = {}

    def connect(self, patience: Patience) -> None:
        """Call the ranks before this one, and answer those after it: ``peers`` has them by place.

        Raises:
            UnreachableError: somebody could not be reached, or did not call.
        """
        self._listener.setblocking(False)
        with selectors.DefaultSelector() as self._selector:
            self._selector.register(self._listener, selectors.EVENT_READ)
            try:
                for other in range(self._place):
                    self._call(other, patience)
                while missing := self._missing():
                    if not patience.look():
                        raise UnreachableError(f"ranks {missing} did not connect within {patience.limit_s:.0f} s")
                    for key, _ in self._selector.select(LOOK_S):
                        if key.fileobj is self._listener:
                            self._let_in()
                        else:
                            self._hear(key.data, patience)
                    self._turn_out()
            except BaseException:
                self.hang_up()
                raise
            finally:
                for guest in list(self._guests.values()):
                    self._drop(guest)

    def hang_up(self) -> None:
        """Close all connections."""
        for connection in self.peers.values():
            connection.close()

    def _missing(self) -> list[int]:
        """Ranks that are no peers yet."""
        there = {*self.peers, self._place}
        return [door.rank for place, door in enumerate(self._doors) if place not in there]

    def _call(self, other: int, patience: Patience) -> None:
        """Again and again: a listener with many callers may refuse one, and it was there before it said where."""
        rank, address, port, secret = self._doors[other]
        while True:
            try:
                connection = socket.create_connection((address, int(port)), timeout=max(patience.look(), LOOK_S))
                connection.sendall(_HELLO.pack(bytes.fromhex(secret), self._place))
            except ConnectionError as error:
                if not patience.look():
                    raise UnreachableError(f"no connection to rank {rank} at {address}:{port}: {error}") from error
                time.sleep(LOOK_S / 2)
            except OSError as error:
                raise UnreachableError(f"no way to rank {rank} at {address}:{port}: {error}") from error
            else:
                return self._welcome(connection, other)

    def _let_in(self) -> None:
        for _ in range(GUESTS):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:  # one that has gone before it came
                continue
            if len(self._callers()) >= GUESTS:
                self._drop(self._callers()[0])
            self._welcome(connection, None)

    def _welcome(self, connection: socket.socket, called: int | None) -> None:
        connection.setblocking(False)
        guest = self._guests[connection] = _Guest(connection, called)
        self._selector.register(connection, selectors.EVENT_READ, guest)

    def _callers(self) -> list[_Guest]:
        return [guest for guest in self._guests.values() if guest.called is None]

    def _hear(self, guest: _Guest, patience: Patience) -> None:
        if guest.connection not in self._guests:
            return  # turned out meanwhile
        expected = _HELLO.size if guest.called is None else SECRET
        try:
            part = guest.connection.recv(expected - len(guest.heard))
        except BlockingIOError:
            return
        except OSError:
            part = b""
        guest.heard += part
        if part and len(guest.heard) < expected:
            return
        if self._accepts(guest):
            return
        self._drop(guest)
        if guest.called is not None:
            self._call(guest.called, patience)

    def _accepts(self, guest: _Guest) -> bool:
        """Whether the other end is a rank, which is then a peer."""
        mine = bytes.fromhex(self._doors[self._place].secret)
        if guest.called is not None:
            other, known = guest.called, hmac.compare_digest(guest.heard, mine)
        else:
            secret, other = _HELLO.unpack(guest.heard) if len(guest.heard) == _HELLO.size else (b"", 0)
            known = hmac.compare_digest(secret, mine) and self._place < other < len(self._doors)
        if not known:
            return False
        if guest.called is None:
            try:
                guest.connection.sendall(bytes.fromhex(self._doors[other].secret))
            except OSError:
                return False
        self._selector.unregister(guest.connection)
        del self._guests[guest.connection]
        if other in self.peers:  # a connection that broke before its answer came
            self.peers[other].close()
        self.peers[other] = guest.connection
        return True

    def _turn_out(self) -> None:
        """Drop callers who have said too little for too long."""
        for guest in self._callers():
            if time.monotonic() - guest.since_s > SILENT_S:
                self._drop(guest)

    def _drop(self, guest: _Guest) -> None:
        self._selector.unregister(guest.connection)
        del self._guests[guest.connection]
        guest.connection.close()
