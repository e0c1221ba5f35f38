"""A rank that waits for gloo notices by another connection that the other rank has ended, and only then."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import cast

import pytest
import torch
import torch.distributed as dist

from distnorm.transport import shared_memory, sockets, torch_work
from distnorm.transport.direct import Direct
from distnorm.transport.patience import LOOK_S
from distnorm.transport.senders import sender
from tests.support.pool import Pool

WAYS = {"memory": shared_memory.join, "sockets": sockets.join}
WHO = sender("norm", "", "forward", 1)


class Work:
    """A collective of torch's that completes after so many slices, or fails then."""

    def __init__(self, slices: float, error: str = "") -> None:
        self.left, self.error = slices, error

    def is_completed(self) -> bool:
        return self.left <= 0

    def wait(self, timeout: timedelta = timedelta()) -> None:
        self.left -= 1
        if self.left > 0:
            raise RuntimeError("Operation timed out!")
        if self.error:
            raise RuntimeError(self.error)


def waited(work: Work, beside: Direct) -> str:
    try:
        torch_work.wait(cast(dist.Work, work), beside)
    except RuntimeError as error:
        return str(error)
    return "completed"


def join(way: str) -> Direct:
    direct = WAYS[way]((0, 1), dist.get_rank(), timedelta(seconds=30))
    assert direct is not None
    return direct


def one_ends(rank: int, way: str) -> list[object]:
    direct = join(way)
    direct.start(torch.ones(3, dtype=torch.float64), WHO).wait()
    found: list[object] = [direct.gone()]
    found += [waited(Work(3), direct), waited(Work(3, "refused"), direct), waited(Work(-1, "refused"), direct)]
    dist.barrier()
    if rank == 1:
        direct.start(torch.ones(3, dtype=torch.float64), WHO)  # a message that nobody has read is no sign of life
        direct.close()
        dist.barrier()
        return found
    dist.barrier()
    started = time.monotonic()
    while direct.gone() is None and time.monotonic() < started + 10:
        time.sleep(0.01)
    found += [direct.gone(), waited(Work(3), direct), waited(Work(10**6), direct)]
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_end_of_a_rank_is_noticed(pool: Pool, way: str) -> None:
    alive = [None, "completed", "refused", "refused"]
    first, second = pool.run(2, one_ends, way)
    assert first == [*alive, 1, "completed", "rank 1 has ended."]
    assert second == alive


def one_is_late(rank: int) -> list[float]:
    """gloo's work goes on after slices of waiting for it."""
    direct, values = join("memory"), torch.full((3,), 1.0 + rank)
    time.sleep(rank * 6 * LOOK_S)
    work = dist.all_reduce(values, async_op=True)
    assert work is not None
    torch_work.wait(work, direct)
    return values.tolist()


def test_gloo_goes_on_after_a_slice(pool: Pool) -> None:
    assert pool.run(2, one_is_late) == [[3.0] * 3] * 2


def both_train(rank: int) -> int:
    """The group for collectives in the background has none of its own, and looks at that of the blocking ones."""
    from distnorm.transport.group import TorchGroup
    from distnorm.transport.topology import Topology

    blocking, background = Topology((0, 1), timeout=timedelta(seconds=30)).pair(None)
    assert isinstance(blocking, TorchGroup) and isinstance(background, TorchGroup)
    assert blocking.direct is not None and background.direct is None
    return int(background._beside is blocking.direct is blocking._beside)


def test_collectives_in_the_background_are_watched_too(pool: Pool) -> None:
    assert pool.run(2, both_train) == [1, 1]
