"""Ranks of one host that sum through shared memory: the bits of rank order, and no hang whatever a rank does."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distnorm
from distnorm.attach import conversions_of
from distnorm.transport import shared_memory
from distnorm.transport.shared_memory import CAPACITY, SharedMemory
from tests.support.pool import Pool

TURNS = 60


def join(seconds: float = 30.0) -> SharedMemory:
    ranks = tuple(range(dist.get_world_size()))
    memory = shared_memory.join(ranks, dist.get_rank(), timedelta(seconds=seconds))
    assert memory is not None
    return memory


def vector(rank: int, turn: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    length = [1, 129, CAPACITY][turn % 3]
    return torch.randn(length, generator=generator, dtype=torch.float64)


def in_rank_order(turn: int, world_size: int) -> Tensor:
    total = vector(0, turn)
    for rank in range(1, world_size):
        total = total + vector(rank, turn)
    return total


def sum_turns(rank: int) -> None:
    memory = join()
    for turn in range(TURNS):
        if (turn + rank) % 7 == 0:
            time.sleep(0.002)  # ranks do not arrive together
        wire = vector(rank, turn)
        started = memory.start(wire)
        wire.zero_()  # it was copied
        started.wait()
        assert torch.equal(started.total(), in_rank_order(turn, dist.get_world_size()))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_sums_are_those_in_rank_order_to_the_bit(pool: Pool, world_size: int) -> None:
    pool.run(world_size, sum_turns)
    assert not list(Path("/dev/shm").glob("distnorm-*"))


def wait_in_another_order(rank: int) -> None:
    memory = join()
    turns = [memory.start(vector(rank, turn)) for turn in range(5)]
    for turn in (4, 0, 2, 3, 1, 0):
        turns[turn].wait()
        assert torch.equal(turns[turn].total(), in_rank_order(turn, dist.get_world_size()))


def test_turns_may_be_waited_for_in_any_order(pool: Pool) -> None:
    pool.run(2, wait_in_another_order)


def what_goes_wrong(rank: int, how: str) -> tuple[str, float]:
    """What rank 0 is told, and after how long."""
    memory = join(seconds=1.0 if how == "asleep" else 30.0)
    dist.barrier()
    if rank == 1 and how == "gone":
        memory.close()
    elif rank == 1 and how == "asleep":
        time.sleep(2.5)
    elif rank == 1 and how == "late":
        time.sleep(0.5)
    started = time.monotonic()
    said = ""
    if rank == 0 or how in ("late", "longer"):
        try:
            memory.start(torch.ones(3 + rank * (how == "longer"), dtype=torch.float64)).wait()
        except RuntimeError as error:
            said = str(error)
    return said, time.monotonic() - started


@pytest.mark.parametrize(
    ("how", "said", "seconds"),
    [
        ("gone", "rank 1 has ended.", 1.0),
        ("asleep", "rank 1 did not take part within 1 s.", 2.0),
        ("late", "", 1.0),
    ],
)
def test_a_rank_that_does_not_come(pool: Pool, how: str, said: str, seconds: float) -> None:
    (found, waited), _ = pool.run(2, what_goes_wrong, how)
    assert found == said
    assert waited < seconds


def test_vectors_of_unequal_length_are_an_error_on_every_rank(pool: Pool) -> None:
    (first, _), (second, _) = pool.run(2, what_goes_wrong, "longer")
    assert first == "rank 1 sent another number of values than 3."
    assert second == "rank 0 sent another number of values than 4."


def decline(rank: int, how: str) -> bool:
    """Whether this rank got no memory, because rank 1, or rank 0, cannot have it."""
    monkeypatch = pytest.MonkeyPatch()
    if rank == 1 and how == "library":
        monkeypatch.setattr(shared_memory, "library", lambda: None)
    elif rank == 1 and how == "host":
        monkeypatch.setattr(shared_memory, "host_id", lambda: "another")
    elif rank == 1 and how == "folder":
        monkeypatch.setattr(shared_memory.os, "open", refuse)
    elif rank == 0 and how == "room":
        monkeypatch.setattr(shared_memory.os, "posix_fallocate", refuse)
    with monkeypatch.context():
        joined = shared_memory.join((0, 1), rank, timedelta(seconds=30))
    monkeypatch.undo()
    return joined is None


def refuse(*args: object) -> None:
    raise OSError("not here")


@pytest.mark.parametrize("how", ["library", "host", "folder", "room"])
def test_all_ranks_do_without_if_one_must(pool: Pool, how: str) -> None:
    assert pool.run(2, decline, how) == [True, True]
    assert not list(Path("/dev/shm").glob("distnorm-*"))


def how_it_travels(rank: int) -> bool:
    model = distnorm.convert(nn.Sequential(nn.BatchNorm1d(3)), "sync_bn")
    model(torch.full((2, 3), float(rank)))
    torch.testing.assert_close(model[0].running_mean, torch.full((3,), 0.05))
    (conversion,) = conversions_of(model)
    return conversion.bound().reducer.group.memory is not None


def test_ranks_of_one_host_use_it(pool: Pool) -> None:
    assert pool.run(2, how_it_travels) == [True, True]
