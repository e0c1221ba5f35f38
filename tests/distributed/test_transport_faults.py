"""What happens to ranks from outside while they bind or share: signals, suspension, kills, forks."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distnorm
from distnorm.transport import shared_memory, sockets
from distnorm.transport.direct import Direct
from distnorm.transport.patience import LONGEST_GAP_S, Patience
from distnorm.transport.rendezvous import all_gather_text
from distnorm.transport.senders import sender
from tests.support.pool import Pool, WorkerDiedError
from tests.support.thinned import thinned

WAYS = {"memory": shared_memory.join, "sockets": sockets.join}
WHO, OTHER = sender("norm", "", "forward", 1), sender("other", "", "forward", 1)


def join(way: str, seconds: float = 30.0) -> Direct:
    direct = WAYS[way](tuple(range(dist.get_world_size())), dist.get_rank(), timedelta(seconds=seconds))
    assert direct is not None
    return direct


def ones(rank: int) -> Tensor:
    return torch.full((5,), 1.0 + rank, dtype=torch.float64)


# --- signals -------------------------------------------------------------------------------------


def bind_alone(rank: int) -> float:
    if rank == 1:
        return 0.0
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            distnorm.attach(distnorm.convert(nn.Sequential(nn.BatchNorm1d(3)), "sync_bn"))
    finally:
        signal.signal(signal.SIGINT, before)
    return time.monotonic() - started


def test_an_interrupt_is_heard_while_binding(pool: Pool) -> None:
    """Whose timeout is two minutes."""
    waited, _ = pool.run(2, bind_alone)
    assert waited < 20


def meet_again(rank: int) -> list[list[str]]:
    """A rank that is interrupted in a meeting comes to the same one when it tries again."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for point in ("publish", "leave", "key"):
            if rank == 1:
                from distnorm.transport import rendezvous

                interrupt_once(patch, rendezvous._Room, point)
                with pytest.raises(KeyboardInterrupt):
                    all_gather_text((0, 1), f"{point} {rank}", timedelta(seconds=30))
            found.append(all_gather_text((0, 1), f"{point} {rank}", timedelta(seconds=30)))
    return found


def interrupt_once(patch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool = False) -> None:
    real, calls = getattr(owner, name), iter([True])

    def interrupted(*arguments: Any, **options: Any) -> Any:
        first = next(calls, False)
        result = real(*arguments, **options) if after or not first else None
        if first:
            raise KeyboardInterrupt
        return result

    patch.setattr(owner, name, interrupted)


def test_a_meeting_that_was_interrupted_goes_on(pool: Pool) -> None:
    expected = [[f"{point} 0", f"{point} 1"] for point in ("publish", "leave", "key")]
    assert pool.run(2, meet_again) == [expected] * 2


def sum_interrupted(rank: int, way: str, point: str, after: bool) -> list[float]:
    """Rank 0 is interrupted in its second turn, and tries again."""
    direct = join(way)
    totals = []
    for turn in range(4):
        payload = ones(rank) * 10**turn
        if rank == 0 and turn == 1:
            with pytest.MonkeyPatch.context() as patch:
                interrupt_once(patch, direct, point, after=after)
                with pytest.raises(KeyboardInterrupt):
                    direct.start(payload, WHO).wait()
            if after or point == "finish":  # its vector is on its way: the turn is over as soon as the next one begins
                totals.append(0.0)
                continue
        totals.append(float(direct.start(payload, WHO).wait()[0]))
    return totals


@pytest.mark.parametrize(("point", "after"), [("post", False), ("post", True), ("finish", False), ("finish", True)])
@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_skips_no_turn(pool: Pool, way: str, point: str, after: bool) -> None:
    first, second = pool.run(2, sum_interrupted, way, point, after, timeout=60.0)
    assert second == [3.0, 30.0, 300.0, 3000.0]
    assert [mine for mine in first if mine] == [mine for mine, theirs in zip(second, first, strict=True) if theirs]


def tear(rank: int) -> str:
    direct = join("sockets")
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            connection = direct._peers[1]  # type: ignore[attr-defined]

            class Torn:
                def send(self, rest: memoryview) -> int:
                    connection.send(rest[:7])
                    raise KeyboardInterrupt

                def close(self) -> None:
                    connection.close()

            patch.setitem(direct._peers, 1, Torn())  # type: ignore[attr-defined]
            with pytest.raises(KeyboardInterrupt):
                direct.start(ones(rank), WHO)
        with pytest.raises(RuntimeError) as raised:
            direct.start(ones(rank), WHO).wait()
    return str(raised.value)


def test_a_message_that_was_torn_ends_in_errors(pool: Pool) -> None:
    first, second = pool.run(2, tear, timeout=60.0)
    assert "interrupted in the middle of a message" in first
    assert second == "rank 0 has ended."


# --- suspension ----------------------------------------------------------------------------------


def sum_suspended(rank: int, way: str, flag: str) -> list[float]:
    """Both ranks are stopped for longer than the timeout, while rank 0 waits for rank 1."""
    direct = join(way, seconds=4.0)
    pids = " ".join(all_gather_text((0, 1), str(os.getpid()), timedelta(seconds=30), doing="be stopped"))
    if rank == 0:
        script = f"sleep 0.5; kill -STOP {pids}; sleep 6; kill -CONT {pids}; touch {flag}"
        subprocess.Popen(["sh", "-c", script], start_new_session=True)
    if rank == 1:
        while not Path(flag).exists():
            time.sleep(0.05)
    return direct.start(ones(rank), WHO).wait().tolist()


@pytest.mark.parametrize("way", thinned(WAYS, every=2))
def test_time_in_which_nobody_ran_does_not_count(pool: Pool, way: str, tmp_path: Path) -> None:
    assert pool.run(2, sum_suspended, way, str(tmp_path / "continued"), timeout=60.0) == [[3.0] * 5] * 2


def bind_suspended(rank: int, flag: str) -> Tensor:
    pids = " ".join(all_gather_text((0, 1), str(os.getpid()), timedelta(seconds=30), doing="be stopped"))
    if rank == 0:
        script = f"sleep 0.5; kill -STOP {pids}; sleep 7; kill -CONT {pids}; touch {flag}"
        subprocess.Popen(["sh", "-c", script], start_new_session=True)
    while rank == 1 and not Path(flag).exists():
        time.sleep(0.05)
    return torch.tensor([float(text) for text in all_gather_text((0, 1), str(rank), timedelta(seconds=4))])


@pytest.mark.slow
def test_nor_does_it_while_binding(pool: Pool, tmp_path: Path) -> None:
    for found in pool.run(2, bind_suspended, str(tmp_path / "continued"), timeout=60.0):
        assert found.tolist() == [0.0, 1.0]


def test_patience_runs_while_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    patience = Patience(timedelta(seconds=1))
    for _ in range(9):
        now += 0.1
        assert patience.look() > 0
    now += 1e6  # suspended
    assert patience.look() == pytest.approx(max(0.0, 0.1 - LONGEST_GAP_S))
    assert patience.look() == 0.0


# --- kills and forks -----------------------------------------------------------------------------


def die_and_leave_a_child(rank: int, way: str) -> float:
    direct = join(way)
    dist.barrier()
    if rank == 1:
        if os.fork() == 0:  # as a DataLoader's worker
            time.sleep(8)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1 has ended\."):
        direct.start(ones(rank), WHO).wait()
    return time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_rank_whose_child_lives(pool: Pool, way: str) -> None:
    waited, dead = pool.run_all(2, die_and_leave_a_child, way, timeout=60.0)
    assert isinstance(dead, WorkerDiedError)
    assert isinstance(waited, float), waited
    assert waited < 6


def test_a_turn_says_when_it_is_over(pool: Pool) -> None:
    pool.run(2, wait_for_mixed)


def wait_for_mixed(rank: int) -> None:
    """An error that is told once is the same whenever the turn is asked again, without the other ranks."""
    for way in WAYS:
        direct = join(way)
        turn = direct.start(ones(rank), WHO if rank else OTHER)
        said = []
        for _ in range(1 + rank):
            with pytest.raises(
                RuntimeError, match="rank 0: the forward statistics of other, 5 values; rank 1"
            ) as raised:
                turn.wait()
            said.append(str(raised.value))
        assert len(set(said)) == 1
        assert direct.start(ones(rank), WHO).wait().tolist() == [3.0] * 5
