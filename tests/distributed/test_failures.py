"""What goes wrong between ranks ends on every rank, soon, with an error that says what to do."""

from __future__ import annotations

import gc
import os
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm.nn import SyncBatchNorm
from distnorm.transport.group import TorchGroup
from tests.support.pool import Pool, WorkerDiedError
from tests.support.threads import run_threads

C = 3


class Twice(nn.Module):
    """Two norms, so that it matters which of them fails."""

    def __init__(self, features: int = C) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(C)
        self.middle = nn.Linear(C, features)
        self.second = nn.BatchNorm1d(features)

    def forward(self, x_NC: Tensor) -> Tensor:
        return self.second(self.middle(self.first(x_NC)))


def converted(recipe: str = "sync_bn", features: int = C, **options: Any) -> nn.Module:
    return distnorm.convert(Twice(features), recipe, **options)


def batch(rank: int) -> Tensor:
    return torch.randn(4, C, generator=torch.Generator().manual_seed(rank))


def train(model: nn.Module, rank: int) -> None:
    model(batch(rank)).square().sum().backward()


def expect_everywhere(outcomes: list[Any], kind: type[Exception], *words: str) -> None:
    """Every outcome is an error of exactly ``kind`` whose message has all ``words``."""
    for outcome in outcomes:
        assert type(outcome) is kind, outcome
        for word in words:
            assert word in str(outcome)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("last", "sides"),
    [
        (("local_bn", C, {}), ("AllReduce()", "Local()")),
        (("group_bn", C, {"size": 2}), ("AllReduce()", "AllReduce(group_size=2)")),
        (("sync_bn", C + 1, {}), (f"second: {C} features", f"second: {C + 1} features")),
        (("sync_bn", C, {"where": ["first"]}), (f"[second: {C} features", "[nothing]")),
    ],
    ids=["recipe", "options", "features", "layers"],
)
def test_ranks_that_convert_differently(
    pool: Pool, world_size: int, last: tuple[str, int, dict[str, Any]], sides: tuple[str, str]
) -> None:
    outcomes = pool.run_all(world_size, train_differently, world_size - 1, last, timeout=20.0)
    expect_everywhere(outcomes, RuntimeError, "Rank 0 has", f"rank {world_size - 1} has", *sides)


def train_differently(rank: int, odd: int, last: tuple[str, int, dict[str, Any]]) -> None:
    recipe, features, options = last if rank == odd else ("sync_bn", C, {})
    train(converted(recipe, features, **options), rank)


def test_a_rank_that_never_trains_is_named(pool: Pool) -> None:
    *waiting, idle = pool.run_all(3, train_unless, 2, timeout=20.0, group_timeout=2.0)
    expect_everywhere(waiting, RuntimeError, "waited 2 s for ranks [2] to start training")
    assert idle is None


def train_unless(rank: int, idle: int) -> None:
    if rank != idle:
        train(converted(), rank)


def test_training_after_the_process_group_is_destroyed(pool: Pool) -> None:
    outcomes = pool.run_all(2, train_destroy_train)
    expect_everywhere(outcomes, RuntimeError, "has been destroyed", "initialize torch.distributed again", "revert")


def train_destroy_train(rank: int) -> None:
    model = converted()
    train(model, rank)
    dist.destroy_process_group()
    model.eval()(batch(rank))
    train(model.train(), rank)


@pytest.mark.parametrize("recipe", ["sync_bn", "mabn"])
def test_layers_keep_no_destroyed_group_alive(pool: Pool, recipe: str) -> None:
    """A group that is held has threads, which may abort a process that ends."""
    for before, after, group_is_alive in pool.run(2, threads_of_groups, recipe):
        assert after < before
        assert not group_is_alive


def threads_of_groups(rank: int, recipe: str) -> tuple[int, int, bool]:
    model = distnorm.convert(nn.Sequential(nn.BatchNorm1d(C)), recipe)
    train(model, rank)
    ours = [each for each in gc.get_objects() if isinstance(each, TorchGroup) and each.size == 2]
    assert ours
    before = len(os.listdir("/proc/self/task"))
    dist.destroy_process_group()
    return before, len(os.listdir("/proc/self/task")), any(group._process_group() is not None for group in ours)


def test_a_new_process_group_is_bound_anew(pool: Pool, tmp_path: Any) -> None:
    results = pool.run(2, train_in_two_jobs, f"file://{tmp_path}/rendezvous", timeout=20.0)
    norm = nn.BatchNorm1d(C, affine=False)
    expected = norm(torch.cat([batch(0), batch(1)]))
    for rank, (same, swapped) in enumerate(results):
        torch.testing.assert_close(same, expected.chunk(2)[rank])
        torch.testing.assert_close(swapped, expected.chunk(2)[1 - rank])


def train_in_two_jobs(rank: int, where: str) -> tuple[Tensor, Tensor]:
    layer = SyncBatchNorm(C, affine=False)
    first = layer(batch(rank))
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=where, rank=1 - rank, world_size=2)
    second = layer(batch(dist.get_rank()))
    dist.barrier()
    return first, second


def test_a_group_size_that_does_not_divide_the_world(pool: Pool) -> None:
    outcomes = pool.run_all(4, train_in_groups_of_3, timeout=20.0)
    expect_everywhere(outcomes, ValueError, "group size 3", "4 data-parallel ranks", "[1, 2, 4]")


def train_in_groups_of_3(rank: int) -> None:
    train(converted("group_bn", size=3), rank)


def test_one_value_per_channel_over_all_ranks(pool: Pool) -> None:
    outcomes = pool.run_all(2, train_on_one_value, timeout=20.0)
    expect_everywhere(outcomes, ValueError, "first: 1 value per channel across 2 ranks")


def train_on_one_value(rank: int) -> None:
    converted()(batch(rank)[: 1 - rank])


def test_one_value_per_channel_in_a_step_that_is_not_shared() -> None:
    """Only the rank that has one value knows, and says of how many ranks it is."""
    errors = run_threads(4, train_on_one_value_of_its_own)
    assert errors == [
        "first: 1 value per channel across 1 rank; training needs at least 2. Raise the batch size, share over more "
        "ranks, or put the layer in eval().",
        *[""] * 3,
    ]


def train_on_one_value_of_its_own(rank: int) -> str:
    model = converted("periodic_bn", every=2)
    train(model, rank)
    try:
        model(batch(rank)[: 1 if rank == 0 else None])
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("recipe", ["sync_bn", "lazy_bn"])
@pytest.mark.parametrize("throw", [False, True])
def test_ranks_that_run_out_of_data_under_join(pool: Pool, recipe: str, throw: bool) -> None:
    outcomes = pool.run_all(2, train_under_join, recipe, throw, timeout=30.0)
    if throw:  # in torch's words
        expect_everywhere(outcomes[:1], RuntimeError, "exhausted all inputs")
        expect_everywhere(outcomes[1:], RuntimeError, "at least one rank that exhausted inputs")
    else:
        words = "throw_on_early_termination=True", "empty batches"
        expect_everywhere(outcomes, RuntimeError, "first: Join(throw_on_early_termination=False) repeats", *words)


def train_under_join(rank: int, recipe: str, throw: bool) -> None:
    model = DistributedDataParallel(converted(recipe))
    with Join([model], throw_on_early_termination=throw):
        for _ in range(2 + rank):
            train(model, rank)


def test_layers_that_share_nothing_may_run_under_join(pool: Pool) -> None:
    pool.run(2, train_under_join, "local_bn", False, timeout=30.0)


def test_ranks_without_data_go_on_with_empty_batches(pool: Pool) -> None:
    """Two batches and three: the third step is that of the one rank, whose gradients count a half, as under Join."""
    results = pool.run(2, train_with_empty_batches)
    model = converted("local_bn").double()
    model.load_state_dict(results[0]["start"])
    model(batch(1).double()).square().sum().backward()
    for grads in (result["grads"] for result in results):
        for (name, parameter), grad in zip(model.named_parameters(), grads, strict=True):
            torch.testing.assert_close(grad.double() * 2, parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


def train_with_empty_batches(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = DistributedDataParallel(converted())
    start = {name: value.clone() for name, value in model.module.state_dict().items()}
    for step in range(3):
        model.zero_grad()
        train_on = batch(rank) if step < 2 + rank else batch(rank)[:0]
        model(train_on).square().sum().backward()
    return {"start": start, "grads": [parameter.grad for parameter in model.parameters()]}


def test_nodes_of_different_size(pool: Pool) -> None:
    outcomes = pool.run_all(3, train_hierarchically, timeout=20.0, env=lambda rank: {"GROUP_RANK": str(rank // 2)})
    expect_everywhere(outcomes, ValueError, "equally many ranks on every node")


def train_hierarchically(rank: int) -> None:
    train(converted("hierarchical_bn"), rank)


def test_a_rank_that_stops_training(pool: Pool) -> None:
    waiting, idle = pool.run_all(2, train_less, 1, timeout=20.0, group_timeout=2.0)
    expect_everywhere([waiting], RuntimeError, "first: sharing forward statistics", "ranks [0, 1]", "Cause:")
    assert idle is None


def train_less(rank: int, early: int) -> None:
    model = converted()
    for _ in range(1 if rank == early else 2):
        train(model, rank)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_rank_that_fails_in_mid_step(pool: Pool, direction: str) -> None:
    healthy, failed = pool.run_all(2, fail_in_mid_step, direction, timeout=20.0, group_timeout=10.0)
    assert isinstance(failed, ZeroDivisionError)
    expect_everywhere([healthy], RuntimeError, f"second: sharing {direction} statistics", "ranks [0, 1]", "Cause:")


def fail_in_mid_step(rank: int, direction: str) -> None:
    model = converted()
    train(model, rank)
    if rank == 1 and direction == "forward":
        model.middle.register_forward_hook(fail)
    y_NC = model(batch(rank))
    if rank == 1:
        fail()
    y_NC.square().sum().backward()


def fail(*unused: Any) -> None:
    raise ZeroDivisionError


def test_a_rank_that_dies_in_mid_step(pool: Pool) -> None:
    healthy, dead = pool.run_all(2, die_in_mid_step, timeout=20.0, group_timeout=10.0)
    assert isinstance(dead, WorkerDiedError)
    expect_everywhere([healthy], RuntimeError, "second: sharing forward statistics", "ranks [0, 1]", "Cause:")


def die_in_mid_step(rank: int) -> None:
    model = converted()
    train(model, rank)
    if rank == 1:
        model.middle.register_forward_hook(die)
    train(model, rank)


def die(*unused: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
