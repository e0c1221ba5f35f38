"""The pool: results, original exceptions, environments, hangs, deaths, and workers that live on."""

import os
import signal
import time
import warnings
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support import pool as pool_module
from tests.support import worker
from tests.support.pool import Pool, RemoteError, WorkerDiedError


def _sum(rank: int, scale: float) -> torch.Tensor:
    value = torch.full((3,), scale * (rank + 1))
    dist.all_reduce(value)
    return value


def _pid(rank: int) -> int:
    return os.getpid()


def _settings(rank: int) -> dict[str, Any]:
    return {
        "threads": torch.get_num_threads(),
        "seed": torch.initial_seed(),
        "node": os.environ.get("GROUP_RANK"),
        "world": dist.get_world_size(),
        "backend": dist.get_backend(),
    }


def _pollute(rank: int) -> None:
    os.environ["GROUP_RANK"] = "9"
    torch.manual_seed(99)


def _fail_on(rank: int, who: int) -> None:
    if rank == who:
        raise KeyError("only here")
    dist.all_reduce(torch.ones(1))


def _fail_everywhere(rank: int) -> None:
    raise ValueError(f"rank {rank} says no")


class _UnpicklableError(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first}{second}")


def _fail_unpicklably(rank: int) -> None:
    raise _UnpicklableError(4, 2)


def _return_unpicklably(rank: int) -> Any:
    return lambda: rank


def _sleep_on(rank: int, who: int) -> int:
    while rank == who:
        time.sleep(0.05)
    return rank


def _die_on(rank: int, who: int) -> None:
    if rank == who:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def _warn(rank: int, message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=1)


def _wait_for_store(rank: int) -> None:
    dist.distributed_c10d._get_default_store().wait(["never"], timedelta(seconds=0.2))


def _leave_early(rank: int) -> None:
    dist.all_reduce(torch.ones(1))
    if rank == 0:
        return
    time.sleep(0.3)
    group = dist.new_group([1, 2], use_local_synchronization=True)
    dist.all_reduce(torch.ones(1), group=group)


def test_results_come_in_rank_order(pool: Pool) -> None:
    for world_size in (1, 2, 4, 3):
        results = pool.run(world_size, _sum, 2.0)
        assert len(results) == world_size
        for value in results:
            torch.testing.assert_close(value, torch.full((3,), float(world_size * (world_size + 1))))


def test_processes_live_on(pool: Pool) -> None:
    assert pool.run(2, _pid) == pool.run(2, _pid)


def test_settings_and_environment(pool: Pool) -> None:
    plain = {"threads": 1, "seed": 0, "node": None, "world": 4, "backend": "gloo"}
    pool.run(4, _pollute)
    assert pool.run(4, _settings) == [plain] * 4
    nodes = pool.run(4, _settings, env=lambda rank: {"GROUP_RANK": str(rank // 2), "LOCAL_WORLD_SIZE": "2"})
    assert [settings["node"] for settings in nodes] == ["0", "0", "1", "1"]
    assert pool.run(2, _settings, env=[{}, {"GROUP_RANK": "7"}])[1]["node"] == "7"
    assert pool.run(4, _settings) == [plain] * 4


def test_the_original_exception_comes_back(pool: Pool) -> None:
    start = time.monotonic()
    with pytest.raises(KeyError, match="only here") as caught:
        pool.run(3, _fail_on, 1)
    assert time.monotonic() - start < 2  # the others notice the closed connection
    (note,) = caught.value.__notes__
    assert "rank 1 of 3" in note and "in _fail_on" in note


def test_every_rank_has_its_own_outcome(pool: Pool) -> None:
    outcomes = pool.run_all(3, _fail_everywhere)
    assert [(type(error), str(error)) for error in outcomes] == [(ValueError, f"rank {r} says no") for r in range(3)]
    first, second = pool.run_all(2, _fail_on, 0)
    assert isinstance(first, KeyError) and isinstance(second, RuntimeError)
    assert pool.run_all(2, _sum, 0.0)[1].tolist() == [0.0] * 3


def test_what_cannot_be_pickled_is_told_as_text(pool: Pool) -> None:
    with pytest.raises(RemoteError, match="_UnpicklableError: 42"):
        pool.run(1, _fail_unpicklably)
    with pytest.raises(Exception, match="lambda"):
        pool.run(1, _return_unpicklably)


def test_warnings_are_errors_but_for_the_given_filters(pool: Pool) -> None:
    with pytest.raises(UserWarning, match="careful"):
        pool.run(1, _warn, "careful")
    with Pool(1, ["error", "ignore:care.*:UserWarning"]) as lenient:
        lenient.run(1, _warn, "careful")
        with pytest.raises(UserWarning, match="watch out"):
            lenient.run(1, _warn, "watch out")


def test_a_store_timeout_is_an_error_like_any_other(pool: Pool) -> None:
    with pytest.raises(dist.DistStoreError):
        pool.run(2, _wait_for_store)


def test_a_rank_that_is_done_does_not_cut_off_the_others(pool: Pool) -> None:
    pool.run(3, _leave_early)


@pytest.mark.slow
def test_a_hang_is_killed_named_and_replaced(pool: Pool) -> None:
    before = pool.run(2, _pid)
    with pytest.raises(TimeoutError, match=r"rank 1 of 2 still ran after 0\.5 s") as caught:
        pool.run(2, _sleep_on, 1, timeout=0.5)
    assert "_sleep_on" in str(caught.value)
    after = pool.run(2, _pid)
    assert after[0] == before[0] and after[1] != before[1]
    result, late = pool.run_all(2, _sleep_on, 1, timeout=0.5)
    assert result == 0 and isinstance(late, TimeoutError)


def test_a_death_is_named_and_replaced(pool: Pool) -> None:
    with pytest.raises(WorkerDiedError, match="rank 0 of 2 died with exit code -9"):
        pool.run(2, _die_on, 0)
    assert pool.run(2, _sum, 0.0)[0].tolist() == [0.0] * 3


@pytest.mark.slow
def test_a_failure_does_not_wait_long_for_the_others(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "GRACE_S", 0.5)
    start = time.monotonic()
    with pytest.raises(ZeroDivisionError):
        pool.run(2, _sleep_or_fail)
    assert time.monotonic() - start < 10
    pool.run(2, _sum, 0.0)


def _sleep_or_fail(rank: int) -> None:
    if rank == 0:
        raise ZeroDivisionError
    time.sleep(60)


def _fail_and_reconnect_slowly(rank: int) -> None:
    connect = worker._connect

    def slowly(port: int) -> dist.TCPStore:
        time.sleep(2 * rank)
        return connect(port)

    worker._connect = slowly
    raise ValueError("both")


@pytest.mark.slow
def test_what_follows_a_failure_is_not_charged_to_the_next_run() -> None:
    with Pool(2) as own:
        own.run_all(2, _fail_and_reconnect_slowly)
        own.run(2, _sum, 0.0, group_timeout=1.0)


def test_world_sizes_beyond_the_pool_are_refused(pool: Pool) -> None:
    for world_size in (0, 5):
        with pytest.raises(ValueError, match="this pool has 1 to 4 processes"):
            pool.run(world_size, _pid)


def test_close_ends_the_processes() -> None:
    with Pool(1) as own:
        (pid,) = own.run(1, _pid)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
