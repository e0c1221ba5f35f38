"""Sums without gloo, through shared memory and over sockets: equal bits, and no hang whatever a rank does."""

from __future__ import annotations

import gc
import os
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distnorm
from distnorm.attach import conversions_of
from distnorm.transport import shared_memory, sockets
from distnorm.transport.direct import CAPACITY, Direct
from distnorm.transport.senders import sender
from tests.support.pool import Pool

TURNS = 60


WHO = sender("norm", "", "forward", 1)

WAYS = {"memory": shared_memory.join, "sockets": sockets.join}


def join(way: str, seconds: float = 30.0) -> Direct:
    ranks = tuple(range(dist.get_world_size()))
    direct = WAYS[way](ranks, dist.get_rank(), timedelta(seconds=seconds))
    assert direct is not None
    return direct


def vector(rank: int, turn: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    length = [1, 129, CAPACITY][turn % 3]
    return torch.randn(length, generator=generator, dtype=torch.float64)


def in_rank_order(turn: int, world_size: int) -> Tensor:
    total = vector(0, turn)
    for rank in range(1, world_size):
        total = total + vector(rank, turn)
    return total


def sum_turns(rank: int, way: str) -> list[Tensor]:
    """Totals, each right to rounding."""
    direct, totals = join(way), []
    for turn in range(TURNS):
        if (turn + rank) % 7 == 0:
            time.sleep(0.002)  # ranks do not arrive together
        payload = vector(rank, turn)
        started = direct.start(payload, WHO)
        payload.zero_()  # it was copied
        total = started.wait()
        torch.testing.assert_close(total, in_rank_order(turn, dist.get_world_size()), rtol=0, atol=1e-14)
        totals.append(total[:200])
    return totals


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("way", WAYS)
def test_every_rank_gets_the_same_bits(pool: Pool, way: str, world_size: int) -> None:
    first, *others = pool.run(world_size, sum_turns, way)
    for other in others:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))


def wait_in_another_order(rank: int, way: str) -> None:
    direct = join(way)
    turns = [direct.start(vector(rank, turn), WHO) for turn in range(5)]
    for turn in (4, 0, 2, 3, 1, 0):
        torch.testing.assert_close(turns[turn].wait(), in_rank_order(turn, dist.get_world_size()))


@pytest.mark.parametrize("way", WAYS)
def test_turns_may_be_waited_for_in_any_order(pool: Pool, way: str) -> None:
    pool.run(2, wait_in_another_order, way)


def what_goes_wrong(rank: int, way: str, how: str) -> tuple[str, float]:
    """What rank 0 is told, and after how long."""
    direct = join(way, seconds=1.0 if how == "asleep" else 30.0)
    dist.barrier()
    if rank == 1 and how == "gone":
        direct.close()
    elif rank == 1 and how == "asleep":
        time.sleep(2.5)
    elif rank == 1 and how == "late":
        time.sleep(0.5)
    started = time.monotonic()
    said = ""
    if rank == 0 or how in ("late", "longer"):
        try:
            direct.start(torch.ones(3 + rank * (how == "longer"), dtype=torch.float64), WHO).wait()
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
@pytest.mark.parametrize("way", WAYS)
def test_a_rank_that_does_not_come(pool: Pool, way: str, how: str, said: str, seconds: float) -> None:
    (found, waited), _ = pool.run(2, what_goes_wrong, way, how)
    assert found == said
    assert waited < seconds


@pytest.mark.parametrize("way", WAYS)
def test_vectors_of_unequal_length_are_an_error_on_every_rank(pool: Pool, way: str) -> None:
    (first, _), (second, _) = pool.run(2, what_goes_wrong, way, "longer")
    assert first == second
    assert (
        "(rank 0: the forward statistics of norm, 3 values; rank 1: the forward statistics of norm, 4 values)" in first
    )


def decline(rank: int, how: str) -> bool:
    """Whether this rank got no memory, because rank 1, or rank 0, cannot have it."""
    monkeypatch = pytest.MonkeyPatch()
    if rank == 1 and how == "library":
        monkeypatch.setattr(shared_memory, "library", lambda: None)
    elif rank == 1 and how == "host":
        monkeypatch.setattr(shared_memory, "host_id", lambda: "another")
    elif rank == 1 and how == "nameless":
        monkeypatch.setattr(shared_memory.os, "readlink", refuse)
    elif rank == 1 and how == "folder":
        monkeypatch.setattr(shared_memory.os, "open", refuse)
    elif rank == 0 and how == "room":
        monkeypatch.setattr(shared_memory.os, "posix_fallocate", refuse)
    with monkeypatch.context():
        joined = shared_memory.join((0, 1), rank, timedelta(seconds=30))
    monkeypatch.undo()
    return joined is None


def refuse(*args: object, **options: object) -> None:
    raise OSError("not here")


def call_nobody(rank: int, what: str) -> bool:
    """Whether this rank got no sockets, because rank 1 cannot call rank 0, or cannot listen."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(sockets.socket, what, refuse)
        patch.setattr(sockets, "CONNECT_S", 0.2)
        return sockets.join((0, 1), rank, timedelta(seconds=30)) is None


@pytest.mark.parametrize("what", ["create_connection", "create_server"])
def test_all_ranks_do_without_sockets_if_one_cannot_connect(pool: Pool, what: str) -> None:
    assert pool.run(2, call_nobody, what) == [True, True]


def speak_to_a_stranger(rank: int) -> None:
    """Somebody else calls first, and says nothing sensible."""
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            call = socket.create_connection

            def call_twice(address: tuple[str, int], timeout: float) -> socket.socket:
                with call(address, timeout=timeout) as stranger:
                    stranger.sendall(bytes(20))
                return call(address, timeout=timeout)

            patch.setattr(sockets.socket, "create_connection", call_twice)
        direct = join("sockets")
    started = direct.start(torch.ones(3, dtype=torch.float64), WHO)
    assert started.wait().tolist() == [2.0] * 3


def test_strangers_are_not_let_in(pool: Pool) -> None:
    pool.run(2, speak_to_a_stranger)


@pytest.mark.parametrize(("name", "expected"), [("lo", "127.0.0.1"), ("none-such", "127.0.0.1")])
def test_the_interface_is_the_one_that_gloo_uses(monkeypatch: pytest.MonkeyPatch, name: str, expected: str) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", name)
    assert sockets.own_address() == expected


@pytest.mark.parametrize("how", ["library", "host", "nameless", "folder", "room"])
def test_all_ranks_do_without_if_one_must(pool: Pool, how: str) -> None:
    assert pool.run(2, decline, how) == [True, True]


def segments() -> int:
    """How many segments this process holds the file of, which has no name in any folder."""
    return sum(
        os.readlink(each).startswith("/memfd:distnorm") for each in Path("/proc/self/fd").iterdir() if each.is_symlink()
    )


def let_go(rank: int) -> tuple[int, int]:
    gc.collect()  # segments of earlier tests
    direct = join("memory")
    direct.start(torch.ones(3, dtype=torch.float64), WHO).wait()
    held = segments()
    del direct
    gc.collect()
    return held, segments()


def test_the_file_of_a_segment_is_closed_with_it(pool: Pool) -> None:
    """At the latest: a file that is left open is a ResourceWarning when Python ends."""
    assert pool.run(2, let_go) == [(2, 0)] * 2  # mmap holds a second descriptor


def how_it_travels(rank: int) -> bool:
    model = distnorm.convert(nn.Sequential(nn.BatchNorm1d(3)), "sync_bn")
    model(torch.full((2, 3), float(rank)))
    torch.testing.assert_close(model[0].running_mean, torch.full((3,), 0.05))
    (conversion,) = conversions_of(model)
    return conversion.bound().reducer.group.direct is not None


def test_ranks_of_one_host_use_it(pool: Pool) -> None:
    assert pool.run(2, how_it_travels) == [True, True]
