"""Connections between ranks that know each other's addresses and secrets, in the presence of other callers.

A caller sends the secret of the rank that it calls, and its own place. The answer is the caller's secret. Unknown
processes have neither. All connections are read concurrently, so one that sends nothing does not delay the others.
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
_HELLO = struct.Struct(f"!{SECRET}sI")  # the secret of the called rank, and the place of the caller

IDENTIFY_S = 2.0
"""How long a caller may take to identify itself, in seconds."""

MAX_UNIDENTIFIED = 256
"""The largest number of unidentified callers at a time; a further one replaces the oldest."""


class UnreachableError(OSError):
    """A rank could not be reached in time; the message says which."""


class Endpoint(NamedTuple):
    """Where a rank listens, and what a caller must know."""

    rank: int
    address: str
    port: str
    secret: str


@dataclass
class _Unidentified:
    """A connection to an unidentified process: rank number ``called``, or a caller if that is None."""

    connection: socket.socket
    called: int | None
    since_s: float = field(default_factory=time.monotonic)
    heard: bytes = b""


# docs/decisions.md#unknown-processes-that-connect
class Handshake:
    """This rank's part in connecting all ranks with each other."""

    def __init__(self, listener: socket.socket, endpoints: Sequence[Endpoint], place: int) -> None:
        """Start as rank number ``place`` of those at ``endpoints``."""
        self.peers: dict[int, socket.socket] = {}
        self._listener, self._endpoints, self._place = listener, endpoints, place
        self._unidentified: dict[socket.socket, _Unidentified] = {}

    def connect(self, patience: Patience) -> None:
        """Call the ranks before this one, and answer those after it. ``peers`` then has the connections by place.

        Raises:
            UnreachableError: a rank could not be reached, or did not call.
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
                            self._accept_callers()
                        else:
                            self._receive(key.data, patience)
                    self._drop_silent()
            except BaseException:
                self.close()
                raise
            finally:
                for unknown in list(self._unidentified.values()):
                    self._drop(unknown)

    def close(self) -> None:
        """Close all connections."""
        for connection in self.peers.values():
            connection.close()

    def _missing(self) -> list[int]:
        """Return the ranks that are not connected yet."""
        there = {*self.peers, self._place}
        return [endpoint.rank for place, endpoint in enumerate(self._endpoints) if place not in there]

    def _call(self, other: int, patience: Patience) -> None:
        """Call until a connection is made: a listener with many callers may refuse one, although it exists."""
        rank, address, port, secret = self._endpoints[other]
        while True:
            try:
                connection = socket.create_connection((address, int(port)), timeout=max(patience.look(), LOOK_S))
                connection.sendall(_HELLO.pack(bytes.fromhex(secret), self._place))
            except ConnectionError as error:
                if not patience.look():
                    raise UnreachableError(f"no connection to rank {rank} at {address}:{port}: {error}") from error
                time.sleep(LOOK_S / 2)
            except OSError as error:
                raise UnreachableError(f"cannot connect to rank {rank} at {address}:{port}: {error}") from error
            else:
                return self._register(connection, other)

    def _accept_callers(self) -> None:
        for _ in range(MAX_UNIDENTIFIED):
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:  # the caller has disconnected already
                continue
            if len(self._callers()) >= MAX_UNIDENTIFIED:
                self._drop(self._callers()[0])
            self._register(connection, None)

    def _register(self, connection: socket.socket, called: int | None) -> None:
        connection.setblocking(False)
        unknown = self._unidentified[connection] = _Unidentified(connection, called)
        self._selector.register(connection, selectors.EVENT_READ, unknown)

    def _callers(self) -> list[_Unidentified]:
        return [unknown for unknown in self._unidentified.values() if unknown.called is None]

    def _receive(self, unknown: _Unidentified, patience: Patience) -> None:
        if unknown.connection not in self._unidentified:
            return  # dropped meanwhile
        expected = _HELLO.size if unknown.called is None else SECRET
        try:
            part = unknown.connection.recv(expected - len(unknown.heard))
        except BlockingIOError:
            return
        except OSError:
            part = b""
        unknown.heard += part
        if part and len(unknown.heard) < expected:
            return
        if self._verify(unknown):
            return
        self._drop(unknown)
        if unknown.called is not None:
            self._call(unknown.called, patience)

    def _verify(self, unknown: _Unidentified) -> bool:
        """Return whether the other process is a rank, which then becomes a peer."""
        mine = bytes.fromhex(self._endpoints[self._place].secret)
        if unknown.called is not None:
            other, known = unknown.called, hmac.compare_digest(unknown.heard, mine)
        else:
            secret, other = _HELLO.unpack(unknown.heard) if len(unknown.heard) == _HELLO.size else (b"", 0)
            known = hmac.compare_digest(secret, mine) and self._place < other < len(self._endpoints)
        if not known:
            return False
        if unknown.called is None:
            try:
                unknown.connection.sendall(bytes.fromhex(self._endpoints[other].secret))
            except OSError:
                return False
        self._selector.unregister(unknown.connection)
        del self._unidentified[unknown.connection]
        if other in self.peers:  # a connection that broke before its answer was read
            self.peers[other].close()
        self.peers[other] = unknown.connection
        return True

    def _drop_silent(self) -> None:
        """Drop callers that have not identified themselves in time."""
        for unknown in self._callers():
            if time.monotonic() - unknown.since_s > IDENTIFY_S:
                self._drop(unknown)

    def _drop(self, unknown: _Unidentified) -> None:
        self._selector.unregister(unknown.connection)
        del self._unidentified[unknown.connection]
        unknown.connection.close()
