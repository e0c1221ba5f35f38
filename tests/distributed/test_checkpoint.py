"""Activation checkpointing on real processes: recomputing a forward shares nothing and changes no state."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import distnorm
from tests.distributed import jobs
from tests.support.pool import Pool


class Segment(nn.Module):
    """A norm in a segment that is recomputed; ``calls`` of it one after the other."""

    def __init__(self, calls: int, reentrant: bool | None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.calls, self.reentrant = calls, reentrant

    def forward(self, x_NCS: Tensor) -> Tensor:
        h_NCS = self.stem(x_NCS)
        if self.reentrant is None:
            h_NCS = self.segment(h_NCS)
        else:
            h_NCS = checkpoint(self.segment, h_NCS, use_reentrant=self.reentrant)
        return self.head(h_NCS.mean((2, 3)))

    def segment(self, h_NCS: Tensor) -> Tensor:
        for _ in range(self.calls):
            h_NCS = F.gelu(self.norm(h_NCS))
        return h_NCS


class Seen(NamedTuple):
    """What two steps of training leave behind."""

    gradients: list[dict[str, Tensor]]
    running: dict[str, Tensor]
    collectives: int
    steps: list[int]  # those with a collective


def model_of(calls: int, reentrant: bool | None) -> Segment:
    torch.manual_seed(3)
    return Segment(calls, reentrant).double()


def steps(model: nn.Module, x_TNCS: Tensor) -> list[dict[str, Tensor]]:
    gradients = []
    for x_NCS in x_TNCS:
        model.zero_grad()
        model(x_NCS).square().sum(1).mean().backward()
        gradients.append(jobs.gradients_of(model))
    return gradients


def train(rank: int, x_TWNCS: Tensor, calls: int, reentrant: bool | None, recipe: str) -> Seen:
    model = DistributedDataParallel(distnorm.convert(model_of(calls, reentrant), recipe))
    with distnorm.Ledger(model) as ledger:
        gradients = steps(model, x_TWNCS[:, rank])
    return Seen(gradients, jobs.running_statistics(model), ledger.collectives, sorted(ledger.steps))


@pytest.mark.parametrize("calls", [1, 2], ids=["one call", "two calls"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_against_the_joined_batch(pool: Pool, reentrant: bool, calls: int) -> None:
    x_TWNCS, _ = jobs.batches(2, 2)
    stock = model_of(calls, None)
    expected = steps(stock, x_TWNCS.flatten(1, 2))
    for seen in pool.run(2, train, x_TWNCS, calls, reentrant, "sync_bn"):
        torch.testing.assert_close(seen.gradients, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(seen.running, jobs.running_statistics(stock), rtol=1e-9, atol=1e-9)
        assert seen.collectives == 2 * 2 * calls


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("recipe", ["local_bn", "sync_bn", "hierarchical_bn", "periodic_bn"])
def test_against_no_checkpoint(pool: Pool, recipe: str, reentrant: bool) -> None:
    x_TWNCS, _ = jobs.batches(2, 2)
    nodes = [{"GROUP_RANK": "0"}, {"GROUP_RANK": "1"}]
    plain = pool.run(2, train, x_TWNCS, 2, None, recipe, env=nodes)
    checkpointed = pool.run(2, train, x_TWNCS, 2, reentrant, recipe, env=nodes)
    for ours, expected in zip(checkpointed, plain, strict=True):
        torch.testing.assert_close(ours.gradients, expected.gradients, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours.running, expected.running, rtol=0, atol=0)
        assert (ours.collectives, ours.steps) == (expected.collectives, expected.steps)


@pytest.mark.parametrize("recipe", ["sync_bn", "periodic_bn"])
def test_gradient_penalty(pool: Pool, recipe: str) -> None:
    x_TWNCS, _ = jobs.batches(4, 2)
    options = {"every": 2} if recipe == "periodic_bn" else {}
    plain = pool.run(2, penalize, x_TWNCS, None, recipe, options)
    for ours, expected in zip(pool.run(2, penalize, x_TWNCS, False, recipe, options), plain, strict=True):
        torch.testing.assert_close(ours.gradients, expected.gradients, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours.running, expected.running, rtol=1e-12, atol=0)
        assert ours.steps == ([0, 2] if options else [0, 1, 2, 3])
        assert ours.collectives == expected.collectives


def penalize(rank: int, x_TWNCS: Tensor, reentrant: bool | None, recipe: str, options: dict[str, int]) -> Seen:
    model = distnorm.convert(model_of(1, reentrant), recipe, **options)
    gradients = []
    with distnorm.Ledger(model) as ledger:
        for x_NCS in x_TWNCS[:, rank]:
            model.zero_grad()
            jobs.penalty_of(model, x_NCS).backward()
            gradients.append(jobs.gradients_of(model))
    return Seen(gradients, jobs.running_statistics(model), ledger.collectives, sorted(ledger.steps))
