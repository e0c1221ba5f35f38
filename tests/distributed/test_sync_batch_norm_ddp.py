"""Synchronized batch norm in a model under DistributedDataParallel, against one process with the joined batch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import distnorm
from tests.distributed import jobs
from tests.distributed.jobs import Build, Plan, Trained
from tests.support.pool import Pool


def expect_joined(trained: Sequence[Trained], plan: Plan, tolerance: float) -> None:
    """Outputs, gradients, parameters and running statistics of every rank are those of the joined batch."""
    outputs, joined = jobs.train_joined(plan)
    running = {name: value[0] for name, value in joined.running.items()}
    close = {"rtol": tolerance, "atol": tolerance}
    for rank, ours in enumerate(trained):
        torch.testing.assert_close(ours.outputs, outputs[rank], **close)
        torch.testing.assert_close(ours.first_gradients, joined.first_gradients, **close)
        torch.testing.assert_close(ours.parameters, joined.parameters, **close)
        torch.testing.assert_close(ours.running, running, **close)


@pytest.mark.parametrize(
    ("build", "world_size", "dtype", "tolerance"),
    [
        (jobs.converted, 2, torch.float64, 1e-9),
        (jobs.converted, 4, torch.float64, 1e-9),
        (jobs.converted, 2, torch.float32, 2e-4),
        (jobs.converted_late, 2, torch.float64, 1e-9),
        (jobs.converted_late, 4, torch.float64, 1e-9),
        (jobs.dropped_in, 2, torch.float64, 1e-9),
        (jobs.dropped_in, 4, torch.float32, 2e-4),
        (jobs.converted_twice, 2, torch.float64, 1e-9),
    ],
)
def test_training_equals_the_joined_batch(
    pool: Pool, build: Build, world_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    plan = Plan(world_size=world_size, steps=5, dtype=dtype)
    expect_joined(pool.run(world_size, jobs.train, plan, "sync_bn", {}, build), plan, tolerance)


@pytest.mark.parametrize("option", ["static_graph", "gradient_as_bucket_view"])
def test_options_of_the_wrapper(pool: Pool, option: str) -> None:
    plan = Plan(world_size=2, wrapping={option: True})
    expect_joined(pool.run(2, jobs.train, plan, "sync_bn", {}), plan, 1e-9)


@pytest.mark.parametrize("build", [jobs.converted, jobs.converted_late, jobs.dropped_in])
def test_a_rank_may_skip_a_layer_without_norm(pool: Pool, build: Build) -> None:
    plan = Plan(world_size=2, skips=True, wrapping={"find_unused_parameters": True})
    expect_joined(pool.run(2, jobs.train, plan, "sync_bn", {}, build), plan, 1e-9)


@pytest.mark.parametrize("sizes", [(2, 5), (4, 0)], ids=["2+5", "4+0"])
def test_gradients_of_different_sizes(pool: Pool, sizes: tuple[int, int]) -> None:
    (x_NCS,), (labels_N,) = (values.flatten(1, 2) for values in jobs.batches(1, 1, sum(sizes)))
    given = pool.run(2, gradients_of_part, x_NCS.split(sizes), labels_N.split(sizes), sum(sizes))
    model = jobs.net()
    F.cross_entropy(model(x_NCS), labels_N).backward()
    for gradients in given:
        torch.testing.assert_close(gradients, jobs.gradients_of(model), rtol=1e-9, atol=1e-9)


def gradients_of_part(rank: int, inputs: Sequence[Tensor], labels: Sequence[Tensor], total: int) -> dict[str, Tensor]:
    model = DistributedDataParallel(distnorm.convert(jobs.net(), "sync_bn"))
    loss = F.cross_entropy(model(inputs[rank]), labels[rank], reduction="sum") / total
    (loss * dist.get_world_size()).backward()  # DistributedDataParallel averages
    return jobs.gradients_of(model)


def test_autocast(pool: Pool) -> None:
    x_NCS = jobs.batches(1, 2)[0][0].flatten(0, 1).float()
    expected = train_in_bfloat16(jobs.net(torch.float32), x_NCS)
    for gradients, running in pool.run(2, autocast_part, x_NCS):
        assert all(value.dtype == torch.float32 for value in gradients.values())
        torch.testing.assert_close(gradients, expected[0], rtol=0.05, atol=0.01)
        torch.testing.assert_close(running, expected[1], rtol=0.01, atol=0.01)


def autocast_part(rank: int, x_NCS: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = DistributedDataParallel(distnorm.convert(jobs.net(torch.float32), "sync_bn"))
    return train_in_bfloat16(model, x_NCS.chunk(2)[rank])


def train_in_bfloat16(model: torch.nn.Module, x_NCS: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x_NCS).float().square().sum(1).mean()
    loss.backward()
    return jobs.gradients_of(model), jobs.running_statistics(model)


def test_uneven_inputs_that_stop_early(pool: Pool) -> None:
    long, short = pool.run_all(2, run_out_of_inputs, timeout=20.0, group_timeout=10.0)
    assert isinstance(long, RuntimeError) and "at least one rank that exhausted inputs" in str(long)
    assert isinstance(short, RuntimeError) and "exhausted all inputs" in str(short)


def run_out_of_inputs(rank: int) -> None:
    model = DistributedDataParallel(distnorm.convert(jobs.net(), "sync_bn"))
    x_TNCS = jobs.batches(4, 2)[0][: 4 - rank, rank]
    with warnings.catch_warnings(), model.join(throw_on_early_termination=True):
        for x_NCS in x_TNCS:
            model(x_NCS).sum().backward()


def test_rank_0_evaluates_while_the_others_wait(pool: Pool) -> None:
    x_TWNCS, _ = jobs.batches(3, 2)
    (outputs, collectives, state, tracked), (_, _, other, _) = pool.run(
        2, train_evaluate_train, x_TWNCS, timeout=20.0, group_timeout=10.0
    )
    assert collectives == 0
    stock = jobs.net().eval()
    stock.load_state_dict(state)
    torch.testing.assert_close(outputs, stock(x_TWNCS[1, 0]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, other, rtol=0, atol=0)
    assert tracked == 2  # evaluation changed nothing, and training went on after it


def train_evaluate_train(rank: int, x_TWNCS: Tensor) -> tuple[Tensor | None, int, dict[str, Tensor], int]:
    model = DistributedDataParallel(distnorm.convert(jobs.net(), "sync_bn"))
    model(x_TWNCS[0, rank]).square().sum().backward()
    state = {name: value.detach().clone() for name, value in model.module.state_dict().items()}
    model.eval()
    outputs = None
    with distnorm.Ledger(model) as ledger:
        if rank == 0:
            with torch.no_grad():
                outputs = model(x_TWNCS[1, rank])
        dist.barrier()
    model.train()
    model(x_TWNCS[2, rank]).square().sum().backward()
    return outputs, ledger.collectives, state, int(model.module.norm1.num_batches_tracked)


def test_training_forwards_share_and_evaluation_never_does(pool: Pool) -> None:
    assert pool.run(2, count_by_mode, jobs.batches(1, 2)[0][0]) == [{"train": 4, "train, no grad": 2, "eval": 0}] * 2


def count_by_mode(rank: int, x_WNCS: Tensor) -> dict[str, int]:
    model = distnorm.convert(jobs.net(), "sync_bn")
    counts = {}
    with distnorm.Ledger(model) as ledger:
        model(x_WNCS[rank]).sum().backward()
    counts["train"] = ledger.collectives
    with distnorm.Ledger(model) as ledger, torch.no_grad():
        model(x_WNCS[rank])
    counts["train, no grad"] = ledger.collectives
    with distnorm.Ledger(model) as ledger:
        model.eval()(x_WNCS[rank]).sum().backward()
    counts["eval"] = ledger.collectives
    return counts
