"""Copies of a layer: deepcopy, pickle, and what becomes of process groups."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distnorm
from distnorm.methods import BatchNorm
from distnorm.policies import AllReduce, Chain, Periodic
from distnorm.recipe import Recipe
from tests.support.threads import run_threads
from tests.training import batches, converted, same, train, worn


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


WAYS = pytest.mark.parametrize("way", [copy.deepcopy, _pickled, _saved], ids=["deepcopy", "pickle", "torch.save"])
Way = Callable[[nn.Module], nn.Module]
X = batches((6, 3, 5, 4))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(worn(nn.BatchNorm2d(3)), nn.Conv2d(3, 3, 1), nn.Sequential(worn(nn.BatchNorm2d(3))))


@pytest.fixture
def world_of_one() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=5))
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


@WAYS
def test_a_copy_evaluates_and_trains_alike(way: Way) -> None:
    mine = converted(net())
    train(mine, X)
    other = way(mine)
    assert torch.equal(other.eval()(X[0]), mine.eval()(X[0]))
    same(train(other.train(), X), train(mine.train(), X), exactly=True)


@WAYS
def test_a_copy_is_independent(way: Way) -> None:
    mine = converted(net())
    mine(X[0])
    other = way(mine)
    site, copied = mine[0]._site, other[0]._site
    assert copied is not site and copied.key != site.key
    assert copied.conversion is not site.conversion
    assert copied.conversion is other[2][0]._site.conversion
    assert [layer for _, layer in copied.conversion.layers()] == [other[0], other[2][0]]
    assert [layer for _, layer in site.conversion.layers()] == [mine[0], mine[2][0]]
    before = mine[0].running_mean.clone()
    train(other, X)
    assert torch.equal(mine[0].running_mean, before)


@WAYS
def test_a_copied_part_stands_alone(way: Way) -> None:
    mine = converted(net())
    mine(X[0])
    part = way(mine[2])
    conversion = part[0]._site.conversion
    assert [(name, layer) for name, layer in conversion.layers()] == [("2.0", part[0])]
    same(train(part, X), train(way(mine[2]), X), exactly=True)
    assert type(distnorm.revert(part)[0]) is nn.BatchNorm2d
    assert type(mine[2][0]) is distnorm.DistBatchNorm2d


@WAYS
def test_a_copy_of_a_bound_layer_is_unbound(way: Way) -> None:
    mine = converted(net(), "periodic_bn", every=4)
    with distnorm.Ledger(mine) as ledger:
        mine(X[0]).sum().backward()
        conversion = way(mine)[0]._site.conversion
    assert mine[0]._site.conversion._binding.step == 1
    assert conversion._binding is None
    assert conversion.recipe == mine[0].recipe and conversion.recipe.name == "periodic_bn(every=4)"
    assert ledger and not conversion.observers


def test_a_shallow_copy_leaves_the_original_registered() -> None:
    layer = converted(nn.BatchNorm2d(3))
    shallow = copy.copy(layer)
    assert shallow.running_mean is layer.running_mean
    del shallow
    gc.collect()
    assert [each for _, each in layer._site.conversion.layers()] == [layer]


# --- process groups ------------------------------------------------------------------------------

POLICIES = [
    lambda group: AllReduce(process_group=group),
    lambda group: Periodic(every=2, policy=AllReduce(process_group=group)),
    lambda group: Chain(AllReduce(process_group=group), AllReduce(process_group=group)),
]


@pytest.mark.parametrize("policy", POLICIES, ids=["all_reduce", "periodic", "chain"])
@pytest.mark.parametrize("way", [_pickled, _saved], ids=["pickle", "torch.save"])
def test_a_pickled_group_evaluates_and_refuses_to_train(
    world_of_one: dist.ProcessGroup, way: Way, policy: Callable[[dist.ProcessGroup], object]
) -> None:
    mine = converted(net(), Recipe(method=BatchNorm(), policy=policy(world_of_one)))
    train(mine, X)
    expected = mine.eval()(X[0])
    for _ in range(2):  # with a job, then without one
        other = way(mine)
        assert torch.equal(other.eval()(X[0]), expected)
        with pytest.raises(RuntimeError, match=r"process group over ranks \[0\].*distnorm.revert\(model\), then"):
            other.train()(X[0])
        assert torch.equal(way(other).eval()(X[0]), expected)
        train(distnorm.convert(distnorm.revert(other), "sync_bn"), X)
        mine = way(mine) if dist.is_initialized() else mine
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_deepcopied_group_trains(world_of_one: dist.ProcessGroup) -> None:
    mine = converted(net(), Recipe(method=BatchNorm(), policy=AllReduce(process_group=world_of_one)))
    other = copy.deepcopy(mine)
    assert other[0].recipe.policy.process_group is world_of_one
    assert copy.deepcopy(other[0].recipe) == mine[0].recipe
    same(train(other, X), train(mine, X), exactly=True)


def test_a_world_of_one_trains_as_no_world(world_of_one: dist.ProcessGroup) -> None:
    inside, alone = converted(net()), converted(net())
    seen = train(inside, X)
    dist.destroy_process_group()
    same(seen, train(alone, X), exactly=True)


def test_a_destroyed_group_leaves_evaluation(world_of_one: dist.ProcessGroup) -> None:
    mine = converted(net())
    train(mine, X)
    expected = mine.eval()(X[0])
    dist.destroy_process_group()
    assert torch.equal(mine(X[0]), expected)
    with pytest.raises(RuntimeError, match=r"has been destroyed.*initialize torch.distributed again, or call distnorm"):
        mine.train()(X[0])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    train(mine, X)


def test_a_group_that_comes_later_is_taken_up() -> None:
    mine = converted(net())
    train(mine, X)

    def go_on(rank: int) -> int:
        other = copy.deepcopy(mine)
        with distnorm.Ledger(other) as ledger:
            train(other, X)
        return ledger.collectives

    assert run_threads(2, go_on) == [12, 12]
