"""Threaded ranks: results, failures, hangs, and a clean state after each."""

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.support import threads
from tests.support.threads import run_threads, run_threads_all


def _sum(rank: int, scale: float) -> Tensor:
    value = torch.full((3,), scale * (rank + 1))
    dist.all_reduce(value)
    return value


def test_results_come_in_rank_order() -> None:
    assert run_threads(4, lambda rank: (rank, dist.get_rank(), dist.get_world_size())) == [(r, r, 4) for r in range(4)]


def test_collectives_groups_and_store() -> None:
    def work(rank: int) -> tuple[float, list[float], bytes]:
        pair = [0, 1] if rank < 2 else [2, 3]
        group = dist.new_group(pair, use_local_synchronization=True)
        every = dist.new_group(range(4))
        total = torch.tensor([float(rank)])
        dist.all_reduce(total, group=group, async_op=True).wait()
        exchanged = torch.empty(8)
        dist.all_to_all_single(exchanged, torch.full((8,), float(rank)), group=every)
        store = dist.distributed_c10d._get_default_store()
        store.set(f"distnorm/test/{rank}", str(rank))
        store.wait([f"distnorm/test/{other}" for other in range(4)], timedelta(seconds=5))
        return total.item(), exchanged.tolist(), store.get(f"distnorm/test/{(rank + 1) % 4}")

    for rank, (total, exchanged, neighbour) in enumerate(run_threads(4, work)):
        assert total == (1.0 if rank < 2 else 5.0)
        assert exchanged == [0, 0, 1, 1, 2, 2, 3, 3]
        assert neighbour == str((rank + 1) % 4).encode()


class _SharedCotangent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        dy = dy.clone()
        dist.all_reduce(dy)
        return dy


def test_collectives_inside_backward() -> None:
    def work(rank: int) -> Tensor:
        x = torch.ones(3, requires_grad=True)
        (_SharedCotangent.apply(x) * (rank + 1)).sum().backward()
        return x.grad

    for grad in run_threads(4, work):
        torch.testing.assert_close(grad, torch.full((3,), 10.0))


@given(world_size=st.integers(1, 5), scale=st.floats(-8, 8, width=32))
def test_many_runs_in_one_process(world_size: int, scale: float) -> None:
    for value in run_threads(world_size, _sum, scale):
        torch.testing.assert_close(value, torch.full((3,), scale * world_size * (world_size + 1) / 2))


def test_the_first_exception_comes_back_and_releases_the_others() -> None:
    def work(rank: int) -> None:
        if rank == 2:
            raise KeyError("only here")
        dist.all_reduce(torch.ones(1))

    start = time.monotonic()
    with pytest.raises(KeyError, match="only here") as caught:
        run_threads(4, work)
    assert time.monotonic() - start < 2
    assert caught.value.__notes__ == ["Raised on threaded rank 2 of 4."]
    assert [entry.name for entry in caught.traceback][-1] == "work"


def test_a_hang_is_ended_and_shows_the_stacks() -> None:
    def work(rank: int) -> None:
        while rank == 1:
            time.sleep(0.01)

    with pytest.raises(TimeoutError, match=r"Ranks \[1\] of 2 still ran after 0.3 s") as caught:
        run_threads(2, work, timeout=0.3)
    assert "in work" in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]


def test_a_collective_that_one_rank_skips_is_ended() -> None:
    def work(rank: int) -> None:
        if rank != 0:
            dist.all_reduce(torch.ones(1))

    with pytest.raises(TimeoutError, match=r"Ranks \[1, 2\] of 3") as caught:
        run_threads(3, work, timeout=0.3)
    assert "all_reduce" in str(caught.value)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("rank ")]


def test_ranks_that_wait_elsewhere_are_named_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(rank: int) -> None:
        if rank == 0:
            raise ValueError("early")
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(threads, "GRACE_S", 0.2)
    with pytest.raises(ValueError, match="early") as caught:
        run_threads(2, work)
    assert any("Ranks [1] had to be given up" in note for note in caught.value.__notes__)


def test_leaving_by_sys_exit_is_no_success() -> None:
    def work(rank: int) -> None:
        raise SystemExit(f"rank {rank} leaves")

    with pytest.raises(SystemExit, match="leaves"):
        run_threads(2, work)


def test_every_rank_has_its_own_outcome() -> None:
    def work(rank: int) -> int:
        if rank == 0:
            return 7
        if rank == 1:
            raise ValueError("one")
        while True:
            time.sleep(0.01)

    result, error, late = run_threads_all(3, work, timeout=0.5)
    assert result == 7
    assert isinstance(error, ValueError) and str(error) == "one"
    assert isinstance(late, TimeoutError) and "in work" in str(late)


def test_nothing_is_left_behind() -> None:
    world = dist.distributed_c10d._world
    multithreading = torch.autograd.is_multithreading_enabled()
    run_threads(2, _sum, 1.0)
    with pytest.raises(ZeroDivisionError):
        run_threads(2, lambda rank: 1 // rank)
    assert run_threads(2, _sum, 1.0)[0].tolist() == [3.0] * 3
    assert dist.distributed_c10d._world is world
    assert not dist.is_initialized()
    assert torch.autograd.is_multithreading_enabled() is multithreading


def test_no_forward_pass_of_ddp_seems_to_run_on() -> None:
    """The one that begins second ends last, and restores the first, which has ended; threads share the attribute."""
    began, ended = threading.Barrier(2), threading.Event()

    def work(rank: int) -> None:
        model = DistributedDataParallel(nn.Linear(1, 1))
        if rank == 0:
            with model._inside_ddp_forward():
                began.wait()
                began.wait()
            ended.set()
            return
        began.wait()
        with model._inside_ddp_forward():
            began.wait()
            assert ended.wait(5.0)

    run_threads(2, work)
    assert DistributedDataParallel._active_ddp_module is None
