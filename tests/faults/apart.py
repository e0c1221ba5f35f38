"""Hosts of their own for the ranks of a row: each a network namespace with a host name.

``benchmarks/hosts.py`` makes the namespaces. They have no names, so those of other jobs on this machine are in nobody's
way, and they end with the process that keeps them.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import hosts

RANKS, STRANGER = 2, 2
"""How many ranks there are, and the number of a host on which there is none."""
LISTENS, CONNECTED = "0A", "01"
"""States of sockets, in /proc/net/tcp."""


@dataclass(frozen=True)
class Host:
    """Number ``number`` of a network; or this machine, without a ``namespace``."""

    number: int = 0
    namespace: str = ""

    @property
    def address(self) -> str:
        return f"10.77.0.{self.number + 1}" if self.namespace else "127.0.0.1"

    def enter(self) -> None:
        """Go there: this thread, and those that it starts."""
        if not self.namespace:
            return
        libc = ctypes.CDLL(None, use_errno=True)
        namespace = os.open(self.namespace, os.O_RDONLY)
        new_network, new_host_name = 0x40000000, 0x04000000  # CLONE_NEWNET, CLONE_NEWUTS
        if libc.setns(namespace, new_network) or libc.unshare(new_host_name):
            raise OSError(ctypes.get_errno(), f"cannot enter host {self.number}")
        os.close(namespace)
        socket.sethostname(f"host-{self.number}")
        os.environ.update(hosts.environment(self.number, RANKS))


@cache
def why_not() -> str | None:
    """Why this machine has no such hosts; None where it has."""
    return hosts.why_not() if shutil.which("tc") else "a host that drops packets needs iproute2 (tc)"


def hosts_in(file: str) -> list[Host]:
    """What `keep` has written."""
    return [Host(number, namespace) for number, namespace in enumerate(json.loads(file))]


def keep(file: Path) -> None:
    """Keep hosts, which ``file`` then holds, until SIGTERM comes."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    with hosts.network(RANKS + 1, 0.0) as namespaces:
        new = file.with_suffix(".new")
        new.write_text(json.dumps(namespaces))
        new.rename(file)
        signal.sigwait([signal.SIGTERM])


def call_all(pids: list[int]) -> None:
    """Connect to whatever these processes listen to, and say nothing; until a signal comes."""
    calls: dict[tuple[str, int], socket.socket] = {}
    while True:
        for pid in pids:
            with suppress(OSError):  # it has ended, or listens no more
                for place, _ in _sockets_of(pid, LISTENS):
                    if place not in calls:
                        calls[place] = socket.create_connection(place)
        time.sleep(0.001)


def stranger_is_here(host: Host) -> bool:
    """Whether the stranger of the network of ``host`` has connected to it."""
    stranger = Host(STRANGER, host.namespace).address
    return any(caller == stranger for _, (caller, _) in _sockets_of(os.getpid(), CONNECTED))


def _sockets_of(pid: int, state: str) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
    """Addresses and ports, near and far, of IPv4 sockets on the host of ``pid``."""
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        _, near, far, is_in, *_ = line.split()
        if is_in == state:
            yield _place(near), _place(far)


def _place(text: str) -> tuple[str, int]:
    address, port = text.split(":")
    return socket.inet_ntoa(bytes.fromhex(address)[::-1]), int(port, 16)
