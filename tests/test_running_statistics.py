"""Running statistics of ranks are equal to the bit, whatever path each rank's batch takes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import distnorm
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
