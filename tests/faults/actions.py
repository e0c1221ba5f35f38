"""What is done to a rank in training."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from distnorm.transport import sockets
from tests.faults import apart

if TYPE_CHECKING:
    from tests.faults.rank import Rank

LATE_S = 3.0
CHILD_LIVES_S = 4.0
STOPPED_LONGER_S = 2.0
"""How much longer than the timeout ranks are stopped."""


class Injected(Exception):
    """Of the script, not of distnorm."""


class OutOfData(Exception):
    """Ends the loop of a rank."""


def kill(rank: Rank) -> None:
    rank.note("fault")
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_fsync(rank: Rank) -> None:
    """What was written has no name yet."""
    os.fsync = lambda _: kill(rank)


def kill_but_child(rank: Rank) -> None:
    if os.fork() == 0:  # as a DataLoader's worker
        time.sleep(CHILD_LIVES_S)
        os._exit(0)
    kill(rank)


def exit_0(rank: Rank) -> None:
    rank.note("fault")
    os._exit(0)


def fail(rank: Rank) -> None:
    rank.note("fault")
    raise Injected


def leave(rank: Rank) -> None:
    rank.note("fault")
    raise OutOfData


def leave_for_a_barrier(rank: Rank) -> None:
    rank.note("fault")
    try:
        dist.barrier()
    except RuntimeError as error:  # gloo's
        raise Injected from error


def stop_one(rank: Rank) -> None:
    _stop(rank, [os.getpid()])


def stop_all(rank: Rank) -> None:
    _stop(rank, rank.pids)


def _stop(rank: Rank, pids: list[int]) -> None:
    rank.note("fault")
    ours = " ".join(map(str, pids))
    script = f"kill -STOP {ours}; sleep {rank.fault.timeout_s + STOPPED_LONGER_S}; kill -CONT {ours}"
    subprocess.Popen(["sh", "-c", script])
    time.sleep(1.0)  # stopped in here


def interrupt_while_other_is_late(rank: Rank) -> None:
    """Both ranks do this: rank 0 is late, rank 1 waits for it."""
    if rank.number == 0:
        time.sleep(LATE_S)
        rank.note("fault")
        return

    def interrupt() -> None:
        rank.note("fault")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Timer(LATE_S / 3, interrupt).start()


def link_goes_down(rank: Rank) -> None:
    rank.note("fault")
    _on_host(rank, "ip link set eth0 down")


def packets_are_dropped(rank: Rank) -> None:
    """All that this host sends; it goes on hearing the others."""
    rank.note("fault")
    _on_host(rank, "tc qdisc replace dev eth0 root blackhole")


def _on_host(rank: Rank, command: str) -> None:
    """On no other than the host that was made for ``rank``."""
    subprocess.run(["nsenter", f"--net={rank.host.namespace}", *command.split()], check=True)


def let_stranger_in(rank: Rank) -> None:
    """Both ranks do this: the stranger calls before any rank does."""
    rank.note("fault")
    while not apart.stranger_is_here(rank.host):
        time.sleep(0.005)

    def listen(address: str, then=sockets._listen) -> socket.socket | str:
        listener = then(address)
        select.select([listener], [], [])
        return listener

    sockets._listen = listen


STOPS = {"stop_one": (1,), "stop_all": (0, 1)}
"""Which ranks are stopped."""
OF_BOTH = (interrupt_while_other_is_late, let_stranger_in)
ACTIONS = {
    each.__name__: each
    for each in (
        *(kill, kill_at_fsync, kill_but_child, exit_0, fail, leave, leave_for_a_barrier, stop_one, stop_all),
        *(interrupt_while_other_is_late, link_goes_down, packets_are_dropped, let_stranger_in),
    )
}
