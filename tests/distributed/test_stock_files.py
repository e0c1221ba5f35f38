"""What rank 0 saves of a job on real ranks evaluates in the stock model as the trained one does."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

import distnorm
from tests.support.pool import Pool


def zero_redundancy(parameters: Any) -> torch.optim.Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # by torch, when it is imported
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, lr=0.02)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda each: torch.optim.Adam(each, 0.02),
    "SGD": lambda each: torch.optim.SGD(each, 0.05, momentum=0.9),
    "ZeroRedundancy": lambda each: zero_redundancy(each),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.ConvTranspose2d(5, 4, 2), nn.BatchNorm2d(4)]
    return nn.Sequential(*parts).double()


def batch(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64) + 1 + rank


def file_of(wrapped: nn.Module, model: nn.Module, engine: str) -> bytes:
    state = model.state_dict()
    if engine == "fsdp":
        state = get_model_state_dict(wrapped, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def train(rank: int, recipe: str, kind: str, engine: str, saves: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    model = distnorm.convert(net(), recipe, warmup=2)
    wrapped: nn.Module = fsdp.fully_shard(model) if engine == "fsdp" else DistributedDataParallel(model)
    optimizer = OPTIMIZERS[kind](wrapped.parameters())
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        loss = (wrapped(batch(rank, step)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if saves and rank == 0 and engine == "ddp":  # alone, as scripts do
            file_of(wrapped, model, engine)
            model.eval()(batch(0, 99)), model.train()
    stock = net()
    state = torch.load(io.BytesIO(file_of(wrapped, model, engine)), weights_only=True)
    if rank == 0:
        stock.load_state_dict(state, strict=True)
    return stock.eval()(batch(0, 99)).detach(), wrapped.eval()(batch(0, 99)).detach(), losses


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
@pytest.mark.parametrize(
    ("engine", "kind"), [("ddp", "Adam"), ("ddp", "ZeroRedundancy"), ("fsdp", "Adam"), ("fsdp", "SGD")]
)
def test_the_stock_model_evaluates_as_the_trained_one(pool: Pool, recipe: str, engine: str, kind: str) -> None:
    ranks = pool.run(2, train, recipe, kind, engine, True)
    stock, trained, _ = ranks[0]
    torch.testing.assert_close(stock, trained, rtol=0, atol=1e-9)
    torch.testing.assert_close(ranks[1][1], trained, rtol=0, atol=1e-12)  # running statistics and weights agree
    if engine == "ddp" and kind == "Adam":
        for (_, _, losses), (_, _, plain) in zip(ranks, pool.run(2, train, recipe, kind, engine, False), strict=True):
            torch.testing.assert_close(losses, plain, rtol=0, atol=0)
