"""Running statistics of ranks are equal to the bit, whatever path each rank's batch takes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import distnorm
from distnorm.compat.uninterrupted import uninterrupted
from distnorm.kernels.running import update_from_sums, update_running, updating_running
from distnorm.methods import RMS, BatchNorm
from distnorm.types import GlobalStatistics, Running
from tests.support.threads import run_threads

Batch = Callable[[Tensor], Tensor]

BATCHES: dict[str, Batch] = {
    "empty": lambda x: x[:0],
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "with gaps": lambda x: torch.stack((x, x), dim=-1)[..., 0],
    "negative": lambda x: torch._neg_view(-x),
    "half": lambda x: x.bfloat16(),
    "wide": lambda x: x.double(),
    "few values": lambda x: x[:1, :, :1, :2],
}


@pytest.mark.parametrize("other", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("momentum", [0.1, None], ids=["", "average"])
@pytest.mark.parametrize("recipe", ["sync_bn", "hierarchical_bn", "periodic_bn(every=2)", "mabn", "lazy_bn(warmup=2)"])
def test_ranks_agree_to_the_bit(recipe: str, momentum: float | None, other: Batch) -> None:
    stock = nn.BatchNorm2d(3, momentum=momentum)

    def run(rank: int) -> list[Tensor]:
        layer = distnorm.convert(nn.Sequential(copy.deepcopy(stock)), recipe)[0]
        layer.momentum = momentum
        generator = torch.Generator().manual_seed(rank)
        for step in range(5):
            x = torch.randn(2, 3, 4, 4, generator=generator) * torch.tensor([1e-3, 1.0, 50.0]).view(3, 1, 1) + 3
            batch = (other(x) if rank and step != 2 else x).detach().requires_grad_()
            layer(batch).sum().backward()
        return list(layer.buffers())

    first, second = run_threads(2, run)
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_an_empty_batch_counts_for_nothing() -> None:
    x = torch.randn(4, 3, 5, 5)

    def run(rank: int) -> list[Tensor]:
        layer = distnorm.convert(nn.Sequential(nn.BatchNorm2d(3)), "sync_bn")[0]
        layer(x if rank else x[:0])
        return list(layer.buffers())

    stock = nn.BatchNorm2d(3).double()
    stock(x.double())
    for given in run_threads(2, run):
        for one, two in zip(given, stock.buffers(), strict=True):
            torch.testing.assert_close(one.double(), two.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [1.0, 50.0])
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("method", [BatchNorm(), RMS()], ids=repr)
def test_completed_sums_update_running_statistics_in_c_as_in_torch(method, momentum, weight, count):
    """As sums of this step, or as means that became global at its end."""
    x = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means = torch.cat([x.mean(0), x.square().mean(0)][method.raw])
    total = torch.tensor(count, dtype=torch.float64)
    in_torch, by_sums, by_means = (
        Running(torch.full((3,), 0.5), torch.ones(3), torch.tensor(3), momentum) for _ in range(3)
    )
    update_running(in_torch, method.moments(means.view(-1, 3), total), total, bool(weight))
    update_from_sums(method, torch.cat((means * count, total[None])), by_sums, 3, bool(weight))
    uninterrupted(*updating_running(by_means, GlobalStatistics("layer", means, total, torch.tensor(weight)), method, 3))
    for ours in (by_sums, by_means):
        for buffer, expected in zip(ours[:3], in_torch[:3], strict=True):
            torch.testing.assert_close(buffer, expected)
    assert (in_torch.updates == 3) == (not weight or count == 1)
