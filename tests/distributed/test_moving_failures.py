"""Moving statistics when ranks end early, die or come back: errors that say what to do, and runs that go on."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distnorm
from tests.distributed import jobs
from tests.distributed import moving_jobs as moving
from tests.distributed.moving_jobs import WARM, WINDOW, Seen
from tests.support.pool import Pool, WorkerDiedError
from tests.support.thinned import thinned

EARLY = WARM + 3
"""Steps of the rank that stops first, all of them sent."""


def step(model: nn.Module, rank: int, number: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """One step without a word between ranks but ours."""
    x_NCS, labels_N = moving.batch(rank, number)
    model.zero_grad()
    F.cross_entropy(model(x_NCS), labels_N).backward()
    if optimizer is not None:
        optimizer.step()


@pytest.mark.parametrize("boundary", [pytest.param("backward", marks=pytest.mark.slow), "optimizer"])
@pytest.mark.parametrize("recipe", thinned(["mabn", "lazy_bn"], every=2))
def test_a_rank_that_ends_early(pool: Pool, recipe: str, boundary: str) -> None:
    """It never sends the sums of step EARLY, which the other one awaits at the end of the step after."""
    waiting, early = pool.run_all(2, end_early, recipe, boundary, timeout=60.0, group_timeout=5.0)
    assert early == EARLY
    assert type(waiting) is RuntimeError
    for word in (f"of step {EARLY} ", "ranks [0, 1]", "did not arrive", "equally many steps", "Cause:"):
        assert word in str(waiting)


def end_early(rank: int, recipe: str, boundary: str) -> int:
    model = moving.net(recipe)
    optimizer = moving.sgd(model)
    if boundary == "optimizer":
        distnorm.attach(model, optimizer=optimizer)
    steps = EARLY if rank == 1 else EARLY + 10
    for number in range(steps):
        step(model, rank, number, optimizer)
    return steps


def test_saving_after_another_rank_ended_early(pool: Pool) -> None:
    """Saving waits for what is in flight, and says what it is."""
    waiting, early = pool.run_all(2, save_late, timeout=60.0, group_timeout=5.0)
    assert early is None
    assert type(waiting) is RuntimeError
    for word in (f"of step {EARLY} ", "ranks [0, 1]", "did not arrive", "equally many steps", "Cause:"):
        assert word in str(waiting)


def save_late(rank: int) -> None:
    model = moving.net("mabn")
    for number in range(EARLY + (rank == 0)):
        step(model, rank, number)
    if rank == 0:
        with pytest.raises(RuntimeError, match="did not arrive"):
            distnorm.state_dict(model)
        distnorm.state_dict(model)  # it failed once, it fails again


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_uneven_inputs_under_join(pool: Pool, recipe: str) -> None:
    """DistributedDataParallel ends all ranks when one has no more data."""
    for outcome in pool.run_all(2, train_joining, recipe, timeout=30.0, group_timeout=10.0):
        assert isinstance(outcome, RuntimeError)
        assert "exhausted" in str(outcome)


def train_joining(rank: int, recipe: str) -> None:
    model = moving.wrapped(moving.net(recipe))
    with model.join(throw_on_early_termination=True):
        for number in range(EARLY + 2 * (1 - rank)):
            step(model, rank, number)


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_a_rank_that_dies_in_mid_step(pool: Pool, recipe: str) -> None:
    healthy, dead = pool.run_all(2, die_in_mid_step, recipe, timeout=20.0, group_timeout=10.0)
    assert isinstance(dead, WorkerDiedError)
    assert type(healthy) is RuntimeError
    for word in ("moving statistics of step", "ranks [0, 1]", "Some rank has stopped", "Cause:"):
        assert word in str(healthy)


def die_in_mid_step(rank: int, recipe: str) -> None:
    model = moving.net(recipe)
    for number in range(EARLY + 10):
        if rank == 1 and number == EARLY:
            model.conv2.register_forward_hook(die)
        step(model, rank, number)


def die(*unused: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
@pytest.mark.parametrize("at", [3, 10], ids=["warming up", "moving"])
def test_resume(pool: Pool, tmp_path: Path, recipe: str, at: int) -> None:
    straight = pool.run(2, train_and_save, recipe, at, str(tmp_path))
    resumed = pool.run(2, load_and_train, recipe, at, [str(tmp_path / f"{rank}.pt") for rank in range(2)])
    for ours, expected in zip(resumed, straight, strict=True):
        same(ours, expected, at)


@pytest.mark.slow
def test_resume_in_fresh_processes(pool: Pool, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    straight = pool.run(2, train_and_save, "mabn", 10, str(tmp_path))
    with Pool(2, pytestconfig.getini("filterwarnings")) as fresh:
        resumed = fresh.run(2, load_and_train, "mabn", 10, [str(tmp_path / f"{rank}.pt") for rank in range(2)])
    for ours, expected in zip(resumed, straight, strict=True):
        same(ours, expected, 10)


def same(ours: Seen, expected: Seen, at: int) -> None:
    """The second part of the run bit for bit, without a word in the log."""
    assert ours.losses == expected.losses[at:]
    for name in ("parameters", "running", "state"):
        moving.equal(getattr(ours, name), getattr(expected, name))
    assert ours.messages == []


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_resume_from_the_first_rank(pool: Pool, tmp_path: Path, recipe: str, world_size: int) -> None:
    """Windows start warm, what was in flight included; log lines say so, and nothing warns."""
    saved = pool.run(2, train_and_save, recipe, 10, str(tmp_path))[0].extra
    ranks = pool.run(world_size, load_and_train, recipe, 10, [str(tmp_path / "0.pt")] * world_size, logging.INFO)
    moving.equal_on_all_ranks(ranks)
    for rank, each in enumerate(ranks):
        assert each.state["step"] == 20
        words = f"rank {rank} of {world_size} starts warm from the state of rank 0 of 2"
        told = [message for message in each.messages if words in message]
        own = (rank, world_size) == (0, 2)
        assert (len(each.messages), len(told)) == ((0, 0) if own else (1, 1))
        # The step in flight completed, and so did all but the last of those since.
        assert each.running["norm1.num_batches_tracked"] == saved["norm1.num_batches_tracked"] + 10


def test_warm_and_cold(pool: Pool, tmp_path: Path) -> None:
    """A window from another rank's file is in use at once; without a file it is empty, and the log says so."""
    saved = pool.run(2, train_and_save, "mabn", 10, str(tmp_path))[1]
    for window, _ in pool.run(4, peek, str(tmp_path / "1.pt")):
        moving.equal(window, saved.extra["window"])
    for window, messages in pool.run(2, peek, None):
        assert not window["filled"].any()
        assert messages == ["distnorm: moving statistics start cold"]


def peek(rank: int, file: str | None) -> tuple[dict[str, Tensor], list[str]]:
    model = moving.net("mabn")
    with moving.listening(logging.INFO) as messages:
        if file is not None:
            distnorm.load_state_dict(model, torch.load(file, weights_only=True)["moving"])
        (state,) = distnorm.state_dict(model)
    return state["reducer"]["then"]["window"], messages


def test_saving_changes_nothing(pool: Pool, tmp_path: Path) -> None:
    plain = pool.run(2, train_and_save, "mabn", None, str(tmp_path))
    saving = pool.run(2, train_and_save, "mabn", 10, str(tmp_path))
    for ours, expected in zip(saving, plain, strict=True):
        moving.equal(tuple(ours)[:3], tuple(expected)[:3])


def train_and_save(rank: int, recipe: str, at: int | None, folder: str) -> Seen:
    """20 steps, saved before step ``at``; ``extra`` is what the file holds of running statistics and window."""
    model = moving.net(recipe)
    wrapped = moving.wrapped(model)
    optimizer = moving.sgd(model)
    held: dict[str, Any] = {}

    def save(number: int) -> None:
        if at is not None and number == at - 1:
            state = distnorm.state_dict(model)
            (each,) = state
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "moving": state}
            torch.save(saved, Path(folder) / f"{rank}.pt")
            held.update(jobs.running_statistics(model), window=each["reducer"]["then"].get("window"))

    found = moving.train(rank, wrapped, range(20), optimizer=optimizer, after=save)
    return found._replace(extra=held)


def load_and_train(rank: int, recipe: str, at: int, files: list[str], level: int = logging.WARNING) -> Seen:
    saved = torch.load(files[rank], weights_only=True)
    model = moving.net(recipe)
    optimizer = moving.sgd(model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    with moving.listening(level) as messages:
        distnorm.load_state_dict(model, saved["moving"])
        found = moving.train(rank, moving.wrapped(model), range(at, 20), optimizer=optimizer)
    return found._replace(messages=messages)


def test_attaching_in_the_middle_keeps_the_window(pool: Pool) -> None:
    """Another optimizer, another boundary: the steps go on where they were."""
    for before, after in pool.run(2, attach_late):
        assert before["step"] == after["step"] == 10
        moving.equal(after["reducer"], before["reducer"])
        assert before["reducer"]["then"]["window"]["filled"].tolist() == [WINDOW - 1] * 4


def attach_late(rank: int) -> tuple[Any, Any]:
    model = moving.net("mabn")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for number in range(10):
        step(model, rank, number, optimizer)
    (before,) = distnorm.state_dict(model)
    distnorm.attach(model, optimizer=optimizer)
    (after,) = distnorm.state_dict(model)
    return before, after
