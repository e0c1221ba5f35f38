"""What is done to a rank in training."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import torch.distributed as dist

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


STOPS = {"stop_one": (1,), "stop_all": (0, 1)}
"""Which ranks are stopped."""
OF_BOTH = (interrupt_while_other_is_late,)
ACTIONS = {
    each.__name__: each
    for each in (
        *(kill, kill_at_fsync, kill_but_child, exit_0, fail, leave, leave_for_a_barrier, stop_one, stop_all),
        interrupt_while_other_is_late,
    )
}
