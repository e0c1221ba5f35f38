"""A compiled model on real processes: one graph that holds the collectives, equal to what runs without a compiler."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

import distnorm
from tests.distributed import jobs
from tests.support.pool import Pool

STEPS = 3
LAYERS = ("norm1", "norm2")


class Seen(NamedTuple):
    """What training leaves behind, and what it took."""

    gradients: list[dict[str, Tensor]]
    running: dict[str, Tensor]
    collectives: dict[int, dict[str, int]]
    graphs: int


def start(rank: int) -> jobs.Net:
    """Ranks start from running statistics of their own; binding makes them those of rank 0, compiled or not."""
    model = jobs.net()
    model.norm1.running_mean.fill_(rank + 1.0)
    return model


def steps(model: nn.Module, x_TNCS: Tensor) -> tuple[list[dict[str, Tensor]], list[dict[str, int]]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=jobs.LEARNING_RATE)
    gradients, counts = [], []
    for x_NCS in x_TNCS:
        optimizer.zero_grad()
        with distnorm.Ledger(model) as ledger:
            model(x_NCS).square().sum(1).mean().backward()
        counts.append({name: tally.collectives for name, tally in ledger.layers.items()})
        gradients.append(jobs.gradients_of(model))
        optimizer.step()
    return gradients, counts


def train(rank: int, x_TWNCS: Tensor, recipe: str, options: dict[str, Any], backend: str | None) -> Seen:
    model: nn.Module = distnorm.convert(start(rank), recipe, **options)
    counter = CompileCounterWithBackend(backend or "eager")
    if backend is not None:
        torch._dynamo.reset()
        model = torch.compile(model, fullgraph=True, backend=counter)
    model = DistributedDataParallel(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)  # by torch's own compiler
        gradients, counts = steps(model, x_TWNCS[:, rank])
    return Seen(gradients, jobs.running_statistics(model), dict(enumerate(counts)), counter.frame_count)


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sync_bn(pool: Pool, backend: str) -> None:
    x_TWNCS, _ = jobs.batches(STEPS, 2)
    stock = start(0)
    expected, _ = steps(stock, x_TWNCS.flatten(1, 2))
    for seen in pool.run(2, train, x_TWNCS, "sync_bn", {}, backend):
        torch.testing.assert_close(seen.gradients, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(seen.running, jobs.running_statistics(stock), rtol=1e-9, atol=1e-9)
        assert seen.collectives == {step: dict.fromkeys(LAYERS, 2) for step in range(STEPS)}
        assert seen.graphs == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_periodic_bn(pool: Pool, backend: str) -> None:
    arguments = (jobs.batches(STEPS, 2)[0], "periodic_bn", {"every": 2})
    plain = pool.run(2, train, *arguments, None)
    for seen, expected in zip(pool.run(2, train, *arguments, backend), plain, strict=True):
        torch.testing.assert_close(seen.gradients, expected.gradients, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(seen.running, expected.running, rtol=1e-9, atol=1e-9)
        assert seen.collectives == {0: dict.fromkeys(LAYERS, 2), 1: {}, 2: dict.fromkeys(LAYERS, 2)}
        assert seen.graphs == 1
