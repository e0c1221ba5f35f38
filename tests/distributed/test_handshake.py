"""Ranks connect over sockets whoever else calls, within one deadline; ranks are threads here."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import timedelta
from typing import Any

import pytest

from distnorm.transport import addresses, sockets
from distnorm.transport.handshake import SECRET, Endpoint, Handshake, UnreachableError
from distnorm.transport.patience import Patience
from tests.support.pool import Pool, WorkerDiedError

LOOPBACKS = [
    "127.0.0.1",
    pytest.param("::1", marks=pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="no IPv6 here")),
]


def listen(address: str) -> socket.socket:
    found = sockets._listen(address)
    assert isinstance(found, socket.socket), found
    return found


def meet(size: int, address: str = "127.0.0.1", limit_s: float = 30.0, absent: int = -1) -> list[Any]:
    """Each rank's peers, or its error, where ``absent`` listens and does nothing."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(closing(listen(address))) for _ in range(size)]
        endpoints = [
            Endpoint(10 * place, address, str(each.getsockname()[1]), secrets.token_hex(SECRET))
            for place, each in enumerate(listeners)
        ]
        STARTED.append(endpoints[0])
        found: list[Any] = [None] * size

        def connect(place: int) -> None:
            handshake = Handshake(listeners[place], endpoints, place)
            try:
                handshake.connect(Patience(timedelta(seconds=limit_s)))
                found[place] = handshake.peers
            except UnreachableError as error:
                found[place] = str(error)

        threads = [threading.Thread(target=connect, args=(place,)) for place in range(size) if place != absent]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        return found


STARTED: list[Endpoint] = []


@contextmanager
def strangers(behave: Callable[[socket.socket], None], every_s: float) -> Iterator[None]:
    """Call the first rank as soon as it listens, again and again."""
    STARTED.clear()
    over = threading.Event()

    def call() -> None:
        held = []
        while not over.is_set():
            if STARTED:
                try:
                    stranger = socket.create_connection((STARTED[0].address, int(STARTED[0].port)), timeout=1)
                    held.append(stranger)
                    behave(stranger)
                except OSError:
                    pass
            over.wait(every_s)
        for each in held:
            each.close()

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def reset(stranger: socket.socket) -> None:
    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stranger.close()


def guess(stranger: socket.socket) -> None:
    stranger.sendall(bytes(SECRET) + struct.pack("!I", 1))


def claim_too_much(stranger: socket.socket) -> None:
    stranger.sendall(bytes.fromhex(STARTED[0].secret) + struct.pack("!I", 99))


BEHAVIOURS: dict[str, Callable[[socket.socket], None]] = {
    "silent": lambda stranger: None,
    "resets": reset,
    "leaves": socket.socket.close,
    "stammers": lambda stranger: stranger.sendall(b"GET / HTT"),
    "talks": lambda stranger: stranger.sendall(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"),
    "guesses": guess,
    "is no rank": claim_too_much,
}


@pytest.mark.parametrize("address", LOOPBACKS)
@pytest.mark.parametrize("size", [2, 5])
def test_all_connect_with_all(size: int, address: str) -> None:
    found = meet(size, address)
    for place, peers in enumerate(found):
        assert sorted(peers) == [other for other in range(size) if other != place]
        for other, connection in peers.items():
            connection.setblocking(True)
            connection.sendall(bytes([place, other]))
    for place, peers in enumerate(found):
        for other, connection in peers.items():
            assert connection.recv(2) == bytes([other, place])
            connection.close()


@pytest.mark.parametrize("how", BEHAVIOURS)
def test_strangers_wait_for_nobody(how: str) -> None:
    with strangers(BEHAVIOURS[how], every_s=1e-3):
        time.sleep(0.05)
        for _ in range(3):
            found = meet(3)
            assert [len(peers) for peers in found] == [2, 2, 2]
            for peers in found:
                for each in peers.values():
                    each.close()


@pytest.mark.parametrize("how", ["silent", "resets"])
def test_one_deadline_whoever_calls(how: str) -> None:
    with strangers(BEHAVIOURS[how], every_s=0.3):
        started = time.monotonic()
        first, absent, last = meet(3, limit_s=1.5, absent=1)
        assert time.monotonic() - started < 10
    assert absent is None
    assert first == "ranks [10] did not connect within 2 s"
    assert last == "ranks [10] did not connect within 2 s"


def test_a_port_where_nobody_listens() -> None:
    with closing(listen("127.0.0.1")) as mine, closing(listen("127.0.0.1")) as other:
        endpoints = [
            Endpoint(place, *each.getsockname(), secrets.token_hex(SECRET)) for place, each in enumerate((other, mine))
        ]
        other.close()
        with pytest.raises(UnreachableError, match=r"no connection to rank 0 at 127.0.0.1:\d+: .*refused"):
            Handshake(mine, endpoints, 1).connect(Patience(timedelta(seconds=0.5)))


@pytest.mark.parametrize("address", LOOPBACKS)
def test_nobody_listens_on_other_interfaces(address: str) -> None:
    with closing(listen(address)) as listener:
        assert listener.getsockname()[0] == address


def test_an_address_of_another_host() -> None:
    assert "cannot listen on 192.0.2.1" in str(sockets._listen("192.0.2.1"))  # RFC 5737: of nobody


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"GLOO_SOCKET_IFNAME": "lo"}, "127.0.0.1"),
        ({"GLOO_SOCKET_IFNAME": "none-such,lo"}, "127.0.0.1"),
        ({"MASTER_ADDR": "127.0.0.1"}, "10.1.2.3"),
        ({"MASTER_ADDR": "::1"}, "10.1.2.3"),
    ],
)
def test_where_this_host_is_reached(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    resolve = addresses._addresses_of
    here = ["10.1.2.3", "2001:db8::1"]
    monkeypatch.setattr(
        addresses, "_addresses_of", lambda host: here if host == socket.gethostname() else resolve(host)
    )
    assert addresses.own_address() == expected


def test_a_host_without_ipv4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(addresses, "_way_to", lambda host: "2001:db8::7")
    assert addresses.own_address() == "2001:db8::7"
    assert addresses.family_of("2001:db8::7") is socket.AF_INET6


def fall_back(rank: int) -> list[str]:
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    logging.getLogger("distnorm").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sockets, "CONNECT_S", 0.3)
        if rank == 1:
            patch.setattr(Handshake, "connect", lambda handshake, patience: time.sleep(1))
        assert sockets.join((0, 1), rank, timedelta(seconds=30)) is None
    logging.getLogger("distnorm").removeHandler(handler)
    return [record.getMessage() for record in said if record.levelno == logging.WARNING]


def test_gloo_in_place_of_sockets_is_a_warning_that_says_why(pool: Pool) -> None:
    for messages in pool.run(2, fall_back):
        assert len(messages) == 1
        assert "so gloo is used: rank 0: ranks [1] did not connect" in messages[0]


def die_in_handshake(rank: int) -> float:
    if rank == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sockets, "Handshake", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            sockets.join((0, 1, 2), rank, timedelta(seconds=4))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"for ranks \[1\] to connect. They took part before"):
        sockets.join((0, 1, 2), rank, timedelta(seconds=4))
    return time.monotonic() - started


@pytest.mark.slow
def test_a_rank_that_is_killed_in_the_handshake(pool: Pool) -> None:
    first, dead, last = pool.run_all(3, die_in_handshake, timeout=60.0)
    assert isinstance(dead, WorkerDiedError)
    for seconds in (first, last):
        assert isinstance(seconds, float), seconds
        assert seconds < 9  # it was 4 + 10
