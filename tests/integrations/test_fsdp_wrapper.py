"""Scripts that shard their models by FSDP2 and stay as they are; and the classes that FSDP2 makes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
)

import distnorm
from distnorm.attach import conversions_of
from distnorm.integrations.fsdp import wrap_fully_shard
from distnorm.layers.class_swap import swap, underlying
from distnorm.layers.module import DistBatchNorm2d, DistNorm
from distnorm.patterns import Wanted
from distnorm.settings import Settings
from tests.integrations.fsdp_models import Net, net, shard, train, whole
from tests.support.pool import Pool


def wrap(rank: int, check: Callable[[], None], where: Wanted = ()) -> None:
    undo = wrap_fully_shard(Settings(recipe="mabn", where=where))
    try:
        check()
    finally:
        undo()


def one_conversion() -> None:
    from torch.distributed._composable.fsdp import fully_shard as old_path

    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    old_path(model.stem[1])
    assert isinstance(model.stem[1], DistBatchNorm2d)
    fsdp.fully_shard([model.stem[0], model.block[0]])
    shard(model)
    assert len(conversions_of(model)) == 1
    assert [name for name, _ in conversions_of(model)[0].layers()] == ["stem.1", "block.1"]
    assert len(distnorm.layers.weights.centralized(model)) == 2
    torch.testing.assert_close(whole(model), before, rtol=0, atol=0)
    reverted = distnorm.revert(model)
    assert not any(isinstance(each, DistNorm) for each in reverted.modules())
    assert isinstance(model.stem[1], nn.BatchNorm2d) and isinstance(model.stem[1], fsdp.FSDPModule)


def own_conversion_stays() -> None:
    model = shard(distnorm.convert(net(), "sync_bn"))
    assert model.stem[1].recipe.name == "sync_bn"


def meta_device() -> None:
    with torch.device("meta"):
        model = shard(Net())
    model.to_empty(device="cpu")
    set_model_state_dict(model, net(torch.float32).state_dict(), options=StateDictOptions(full_state_dict=True))
    losses = train(model, range(4), 2, dist.get_rank())
    expected = shard(net(torch.float32))
    assert train(expected, range(4), 2, dist.get_rank()) == losses


def where_names_the_whole() -> None:
    model = shard(net())
    assert isinstance(model.block[1], DistNorm) and not isinstance(model.stem[1], DistNorm)
    train(model, [0], 2, dist.get_rank())


def where_names_nothing() -> None:
    model = shard(net())
    text = r"where=\['backbone.\*'\] selects none of \['stem.1', 'block.1'\]. It is the outermost module"
    with pytest.warns(UserWarning, match=text) if dist.get_rank() == 0 else nullcontext():
        train(model, [0], 2, dist.get_rank())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, [0], 2, dist.get_rank())


def where_names_parts() -> None:
    """The whole is not named, so that the conversion of its part stays."""
    model = net()
    fsdp.fully_shard(model.block)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fsdp.fully_shard(model)
    assert isinstance(model.block[1], DistNorm) and not isinstance(model.stem[1], DistNorm)


@pytest.mark.parametrize("check", [one_conversion, own_conversion_stays, meta_device])
def test_fully_shard_converts(pool: Pool, check: Callable[[], None]) -> None:
    original = fsdp.fully_shard
    pool.run(2, wrap, check)
    assert fsdp.fully_shard is original


@pytest.mark.parametrize(
    ("check", "where"),
    [
        (where_names_the_whole, ("block.*",)),
        (where_names_nothing, ("backbone.*",)),
        (where_names_parts, {"Sequential": ("*",)}),
    ],
)
def test_fully_shard_converts_named_layers(pool: Pool, check: Callable[[], None], where: Wanted) -> None:
    pool.run(2, wrap, check, where)


def wrapped_class(rank: int) -> None:
    layer = fsdp.fully_shard(nn.BatchNorm2d(2))
    made = type(layer)
    assert made.__bases__ == (fsdp.FSDPModule, nn.BatchNorm2d)
    assert underlying(layer) is nn.BatchNorm2d
    swap(layer, nn.BatchNorm1d)
    assert type(layer).__bases__ == (fsdp.FSDPModule, nn.BatchNorm1d)
    assert set(vars(made)) - set(vars(type(layer))) == set()


def test_the_class_that_fsdp_makes(pool: Pool) -> None:
    """Private to torch: fails when it wraps modules in another way."""
    pool.run(2, wrapped_class)


def test_other_classes_are_their_own() -> None:
    class Mine(nn.BatchNorm2d):
        pass

    assert underlying(Mine(2)) is Mine
    assert underlying(nn.SyncBatchNorm(2)) is nn.SyncBatchNorm
