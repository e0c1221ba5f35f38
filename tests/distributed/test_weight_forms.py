"""Standardized and normalized weights on two real ranks: training equals that of the joined batch in one process.

The one process has stock batch norm, and the weights come from torch's parametrizations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize

import distnorm
from tests.support.pool import Pool

STEPS = 4
SIZES = (3, 5)
RECIPES: dict[str, dict[str, Any]] = {"sync_bn": {}, "hierarchical_bn": {}, "periodic_bn": {"every": 1}}
EVERY_KIND = pytest.mark.parametrize("kind", ["standardized", "normalized"])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.up, self.norm2 = nn.ConvTranspose2d(4, 6, 2, stride=2), nn.BatchNorm2d(6)
        self.line, self.norm3 = nn.Linear(6, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.up(self.norm1(self.stem(x)).relu())).relu()
        return self.norm3(self.line(y.mean((2, 3))))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


class Standardize(nn.Module):
    """By batch norm over the weights of a filter."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, weight: Tensor) -> Tensor:
        rows = weight.transpose(0, self.dim)
        unit = F.batch_norm(rows.flatten(1).T, None, None, training=True).T
        return unit.reshape(rows.shape).transpose(0, self.dim)


def expected(kind: str) -> Net:
    model = net()
    for layer, dim in ((model.stem, 0), (model.up, 1), (model.line, 0)):
        if kind == "normalized":
            parametrizations.weight_norm(layer, dim=dim)
        else:
            parametrize.register_parametrization(layer, "weight", Standardize(dim))
    return model


def batches() -> Tensor:
    return (
        torch.randn(STEPS, sum(SIZES), 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.4
    )


class Seen(NamedTuple):
    outputs: Tensor
    evaluated: Tensor
    reverted: Tensor
    classes: list[str]


def steps(model: nn.Module, inputs: Tensor, scale: float) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    outputs = []
    for x in inputs:
        optimizer.zero_grad()
        y = model(x)
        ((y - 0.5).pow(3).sum() * scale / sum(SIZES)).backward()
        optimizer.step()
        outputs.append(y.detach())
    return torch.stack(outputs)


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def train(rank: int, kind: str, wrapper: str, recipe: str, options: dict[str, Any]) -> Seen:
    model: nn.Module = distnorm.convert(net(), recipe, weights=kind, **options)
    if wrapper == "fsdp2":
        for part in (model.stem, model.line, model):
            fsdp.fully_shard(part)
        with pytest.raises(ValueError, match=r"^stem: weights='normalized' adds .* is sharded"):
            other = net()
            fsdp.fully_shard(other)
            distnorm.convert(other, "sync_bn", weights="normalized")
    wrapped = DistributedDataParallel(model) if wrapper == "ddp" else model
    first = sum(SIZES[:rank])
    outputs = steps(wrapped, batches()[:, first : first + SIZES[rank]], dist.get_world_size())
    evaluated = model.eval()(batches()[0]).detach()
    if (wrapper, kind) == ("fsdp2", "normalized"):
        with pytest.raises(RuntimeError, match=r"^stem: an engine has sharded the parameter 'gain'"):
            distnorm.revert(model)
        sharded, model = model, distnorm.convert(net(), recipe, weights=kind)
        model.load_state_dict({name: whole(value) for name, value in sharded.state_dict().items()})
    distnorm.revert(model)
    stock = net()
    stock.load_state_dict({name: whole(value) for name, value in model.state_dict().items()})
    return Seen(
        outputs, evaluated, stock.eval()(batches()[0]).detach(), [type(each).__name__ for each in model.modules()]
    )


def revert_without_a_step(rank: int, kind: str) -> tuple[Tensor, Tensor]:
    """FSDP2 keeps the parameters of the whole model gathered after a forward pass, and writes to them are lost."""
    model = fsdp.fully_shard(distnorm.convert(net(), "sync_bn", weights=kind))
    model(batches()[0])
    y = model.eval()(batches()[0]).detach()
    stock = net()
    stock.load_state_dict({name: whole(value) for name, value in distnorm.revert(model).state_dict().items()})
    return y, stock.eval()(batches()[0]).detach()


def convert_what_ddp_holds(rank: int) -> str:
    wrapped = DistributedDataParallel(net())
    distnorm.convert(wrapped.module, "sync_bn", weights="normalized")
    with pytest.raises(RuntimeError) as refused:
        wrapped(batches()[0])
    assert DistributedDataParallel(wrapped.module)(batches()[0]).isfinite().all()
    return str(refused.value)


def agree(seen: list[Seen], kind: str) -> None:
    joined = expected(kind)
    outputs = steps(joined, batches(), 1.0).split(SIZES, dim=1)
    evaluated = joined.eval()(batches()[0]).detach()
    for mine, right in zip(seen, outputs, strict=True):
        torch.testing.assert_close(mine.outputs, right, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(mine.evaluated, evaluated, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(mine.reverted, evaluated, rtol=1e-8, atol=1e-8)
        assert not any("ized" in name for name in mine.classes)


@EVERY_KIND
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_equals_the_joined_batch(pool: Pool, kind: str, recipe: str) -> None:
    agree(pool.run(2, train, kind, "ddp", recipe, RECIPES[recipe]), kind)


@EVERY_KIND
def test_sharded_by_fsdp2_too(pool: Pool, kind: str) -> None:
    agree(pool.run(2, train, kind, "fsdp2", "sync_bn", {}), kind)


@pytest.mark.parametrize("kind", ["centralized", "standardized"])
def test_reverting_what_fsdp2_keeps_gathered(pool: Pool, kind: str) -> None:
    for converted, reverted in pool.run(2, revert_without_a_step, kind):
        torch.testing.assert_close(reverted, converted)


def test_gains_that_ddp_would_not_reduce_are_refused(pool: Pool) -> None:
    for message in pool.run(2, convert_what_ddp_holds):
        assert message.startswith("stem.gain: this parameter was added after DistributedDataParallel wrapped")
