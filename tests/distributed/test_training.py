"""Every recipe trains under DistributedDataParallel, and in every way of training that a model may need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

import distnorm
from tests.distributed import jobs
from tests.distributed.jobs import Plan, Trained
from tests.support.pool import Pool

STEPS = 30
NORMS = ("norm1", "norm2")


class Case(NamedTuple):
    """A recipe and how its ranks share: in blocks of ``group_size``, in every ``every``-th step."""

    recipe: str
    options: dict[str, Any]
    world_size: int
    group_size: int
    every: int = 1

    def __str__(self) -> str:
        return f"{self.recipe}-{self.world_size}"


CASES = [
    Case("local_bn", {}, 2, 1),
    Case("sync_bn", {}, 2, 2),
    Case("sync_bn", {}, 4, 4),
    Case("group_bn", {"size": 2}, 4, 2),
    Case("hierarchical_bn", {}, 4, 4),
    Case("periodic_bn", {"every": 4}, 2, 2, 4),
    Case("periodic_bn", {"every": 4}, 4, 4, 4),
]
APART = [case for case in CASES if case.group_size < case.world_size]


def nodes(rank: int) -> dict[str, str]:
    """Two ranks per node."""
    return {"GROUP_RANK": str(rank // 2)}


def train(pool: Pool, case: Case, plan: Plan) -> list[Trained]:
    return pool.run(case.world_size, jobs.train, plan, case.recipe, case.options, env=nodes)


@pytest.mark.parametrize("skips", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "skips"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_equals_that_of_the_joined_blocks(pool: Pool, case: Case, skips: bool) -> None:
    wrapping = {"find_unused_parameters": True} if skips else {}
    plan = Plan(world_size=case.world_size, steps=STEPS, skips=skips, wrapping=wrapping, unites=case in APART)
    outputs, joined = jobs.train_joined(plan, case.group_size, case.every)
    trained = train(pool, case, plan)
    for rank, ours in enumerate(trained):
        torch.testing.assert_close(ours.outputs, outputs[rank], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.parameters, joined.parameters, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.parameters, trained[0].parameters, rtol=0, atol=0)
        torch.testing.assert_close(ours.united, trained[0].united, rtol=0, atol=0)
        if case not in APART:
            torch.testing.assert_close(ours.united, ours.running, rtol=0, atol=0)
            expected = {name: value[0] for name, value in joined.running.items()}
            torch.testing.assert_close(ours.running, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("broadcast_buffers", [False, True])
@pytest.mark.parametrize("case", APART, ids=str)
def test_running_statistics_are_each_blocks_own(pool: Pool, case: Case, broadcast_buffers: bool) -> None:
    plan = Plan(world_size=case.world_size, wrapping={"broadcast_buffers": broadcast_buffers})
    _, joined = jobs.train_joined(plan, case.group_size)
    for rank, ours in enumerate(train(pool, case, plan)):
        expected = {name: value[rank // case.group_size] for name, value in joined.running.items()}
        torch.testing.assert_close(ours.running, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", APART, ids=str)
def test_united_running_statistics_obey_the_law_of_total_variance(pool: Pool, case: Case) -> None:
    plan = Plan(world_size=case.world_size, wrapping={"broadcast_buffers": False}, unites=True)
    trained = train(pool, case, plan)
    for norm in NORMS:
        mean_WC = torch.stack([ours.running[f"{norm}.running_mean"] for ours in trained])
        var_WC = torch.stack([ours.running[f"{norm}.running_var"] for ours in trained])
        assert mean_WC.var(0).max() > 1e-6  # there is something to unite
        for ours in trained:
            torch.testing.assert_close(ours.united[f"{norm}.running_mean"], mean_WC.mean(0))
            total_C = var_WC.mean(0) + mean_WC.var(0, correction=0)
            torch.testing.assert_close(ours.united[f"{norm}.running_var"], total_C)


@pytest.mark.parametrize("no_sync", [False, True], ids=["", "no_sync"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_gradient_accumulation(pool: Pool, world_size: int, no_sync: bool) -> None:
    x_TWNCS, labels_TWN = jobs.batches(3, world_size)
    given = pool.run(world_size, accumulate, x_TWNCS, labels_TWN, no_sync)
    model = jobs.net()
    for x_NCS, labels_N in zip(x_TWNCS.flatten(1, 2), labels_TWN.flatten(1, 2), strict=True):
        F.cross_entropy(model(x_NCS), labels_N).backward()
    for gradients, running in given:
        torch.testing.assert_close(gradients, jobs.gradients_of(model), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(running, jobs.running_statistics(model), rtol=1e-9, atol=1e-9)


def accumulate(
    rank: int, x_TWNCS: Tensor, labels_TWN: Tensor, no_sync: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = DistributedDataParallel(distnorm.convert(jobs.net(), "sync_bn"))
    micro = list(zip(x_TWNCS[:, rank], labels_TWN[:, rank], strict=True))
    last = micro.pop()
    for x_NCS, labels_N in micro:
        if no_sync:
            with model.no_sync():
                F.cross_entropy(model(x_NCS), labels_N).backward()
        else:
            F.cross_entropy(model(x_NCS), labels_N).backward()
    F.cross_entropy(model(last[0]), last[1]).backward()
    return jobs.gradients_of(model), jobs.running_statistics(model)


@pytest.mark.parametrize("case", [case for case in CASES if case.world_size == 2], ids=str)
def test_gradient_penalty(pool: Pool, case: Case) -> None:
    x_TWNCS, _ = jobs.batches(5, 2)
    expected = penalties(jobs.joined_net(2, case.group_size, case.every), x_TWNCS.flatten(1, 2))
    for gradients in pool.run(2, penalize, case.recipe, case.options, x_TWNCS):
        torch.testing.assert_close(gradients, expected, rtol=1e-8, atol=1e-10)


def penalize(rank: int, recipe: str, options: dict[str, Any], x_TWNCS: Tensor) -> list[dict[str, Tensor]]:
    model = DistributedDataParallel(distnorm.convert(jobs.net(), recipe, **options))
    return penalties(model, x_TWNCS[:, rank])


def penalties(model: torch.nn.Module, x_TNCS: Tensor) -> list[dict[str, Tensor]]:
    """Gradients of every step."""
    gradients = []
    for x_NCS in x_TNCS:
        model.zero_grad()
        jobs.penalty_of(model, x_NCS).backward()
        gradients.append(jobs.gradients_of(model))
    return gradients


@pytest.mark.parametrize("case", [case for case in CASES if case.group_size == case.world_size == 2], ids=str)
def test_running_statistics_estimated_anew(pool: Pool, case: Case) -> None:
    x_TWNCS, _ = jobs.batches(3, 2)
    stock = jobs.net()
    update_bn(list(x_TWNCS.flatten(1, 2)), stock)
    for running in pool.run(2, estimate_anew, case.recipe, case.options, x_TWNCS):
        torch.testing.assert_close(running, jobs.running_statistics(stock), rtol=1e-9, atol=1e-9)


def estimate_anew(rank: int, recipe: str, options: dict[str, Any], x_TWNCS: Tensor) -> dict[str, Tensor]:
    """As after weight averaging: running statistics become those of a pass over the data without backward."""
    model = distnorm.convert(jobs.net(), recipe, **options)
    model(x_TWNCS[0, rank]).sum().backward()
    update_bn(list(x_TWNCS[:, rank]), model)
    return jobs.running_statistics(model)


def test_groups_along_nodes_of_different_size(pool: Pool) -> None:
    x_WNCS = jobs.batches(1, 3)[0][0]
    given = pool.run(3, forward_along_nodes, x_WNCS, env=nodes, timeout=20.0, group_timeout=5.0)
    expected = [*jobs.net()(x_WNCS[:2].flatten(0, 1)).chunk(2), jobs.net()(x_WNCS[2])]
    torch.testing.assert_close(given, [y_NC.detach() for y_NC in expected], rtol=1e-9, atol=1e-9)


def forward_along_nodes(rank: int, x_WNCS: Tensor) -> Tensor:
    model = distnorm.convert(jobs.net(), "group_bn", axis="local")
    return model(x_WNCS[rank]).detach()


@pytest.mark.parametrize("attach", [False, True], ids=["first forward", "attach"])
def test_running_statistics_of_rank_0_are_taken_over(pool: Pool, attach: bool) -> None:
    x_WNCS = jobs.batches(1, 2)[0][0]
    model = marked(jobs.net(), 0)
    if not attach:
        model(x_WNCS.flatten(0, 1))
    for running in pool.run(2, bind_marked, x_WNCS, attach):
        torch.testing.assert_close(running, jobs.running_statistics(model), rtol=1e-9, atol=1e-9)


def bind_marked(rank: int, x_WNCS: Tensor, attach: bool) -> dict[str, Tensor]:
    model = distnorm.convert(marked(jobs.net(), rank), "sync_bn")
    if attach:
        distnorm.attach(model)
    else:
        model(x_WNCS[rank])
    return jobs.running_statistics(model)


def marked(model: jobs.Net, rank: int) -> jobs.Net:
    """Running statistics that tell the rank."""
    for norm in (model.norm1, model.norm2):
        norm.running_mean.fill_(rank + 1.5)
        norm.running_var.fill_(rank + 2.5)
        norm.num_batches_tracked.fill_(rank + 3)
    return model


def test_groups_of_ranks_may_train_models_of_their_own(pool: Pool) -> None:
    x_WNCS = jobs.batches(1, 4)[0][0]
    given = pool.run(4, forward_in_pairs, x_WNCS)
    for pair in (0, 2):
        expected = jobs.net()(x_WNCS[pair : pair + 2].flatten(0, 1)).detach().chunk(2)
        torch.testing.assert_close(given[pair : pair + 2], list(expected), rtol=1e-9, atol=1e-9)


def forward_in_pairs(rank: int, x_WNCS: Tensor) -> Tensor:
    pairs: Sequence[dist.ProcessGroup] = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model = distnorm.convert(jobs.net(), "sync_bn")
    distnorm.attach(model, process_group=pairs[rank // 2])
    return model(x_WNCS[rank]).detach()
