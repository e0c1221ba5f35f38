"""Buffers that were set to None: layers do what stock layers do, or say which buffer is missing."""

from __future__ import annotations

import copy
import io
from itertools import combinations

import pytest
import torch
from torch import nn

import distnorm
from distnorm.layers.running_statistics import BUFFERS
from tests.training import batches, converted, same, train, worn

X = batches((6, 3, 5, 4), dtype=torch.float64)
MISSING = [names for count in (1, 2, 3) for names in combinations(BUFFERS, count)]
WHOLE = [names for names in MISSING if ("running_mean" in names) == ("running_var" in names)]
HALF = [names for names in MISSING if names not in WHOLE]


def stock(momentum: float | None = 0.1) -> nn.Sequential:
    return nn.Sequential(worn(nn.BatchNorm2d(3, momentum=momentum))).double()


def without(model: nn.Sequential, names: tuple[str, ...]) -> nn.Sequential:
    for name in names:
        setattr(model[0], name, None)
    return model


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("names", WHOLE, ids=", ".join)
@pytest.mark.parametrize("order", ["before", "after"])
def test_training_and_evaluation_are_torchs(names: tuple[str, ...], momentum: float | None, order: str) -> None:
    expected = train(without(stock(momentum), names), X)
    mine = (
        converted(without(stock(momentum), names)) if order == "before" else without(converted(stock(momentum)), names)
    )
    same(train(copy.deepcopy(mine), X), expected)
    distnorm.revert(mine)
    same(train(mine, X), expected)


@pytest.mark.parametrize("names", WHOLE, ids=", ".join)
def test_compiled_training_is_torchs(names: tuple[str, ...]) -> None:
    mine, other = without(converted(stock()), names), without(stock(), names)
    same(train(torch.compile(mine, backend="aot_eager"), X[:1]), train(torch.compile(other, backend="eager"), X[:1]))


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn", "periodic_bn"])
@pytest.mark.parametrize("names", WHOLE, ids=", ".join)
def test_every_recipe_trains(recipe: str, names: tuple[str, ...]) -> None:
    seen = train(without(converted(stock(), recipe), names), X)
    assert all(torch.isfinite(value).all() for value in seen.values())


def test_a_layer_that_no_longer_tracks_is_left_as_it_was() -> None:
    mine = converted(stock(), "lazy_bn")
    mine[0].track_running_stats = False
    before = mine[0].running_var.clone()
    train(mine, X)
    assert torch.equal(mine[0].running_var, before)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("names", HALF, ids=", ".join)
def test_half_of_the_statistics_is_refused_as_by_torch(names: tuple[str, ...], mode: bool) -> None:
    mine, other = without(converted(stock()), names).train(mode), without(stock(), names).train(mode)
    missing, there = ("mean", "var") if "running_mean" in names else ("var", "mean")
    with pytest.raises(ValueError, match=rf"^0: running_{missing} is None and running_{there} is not. Set both"):
        mine(X[0])
    with pytest.raises((ValueError, RuntimeError), match="running_"):
        other(X[0])


@pytest.mark.parametrize("names", MISSING, ids=", ".join)
def test_casts_copies_and_checkpoints(names: tuple[str, ...]) -> None:
    mine, other = without(converted(stock()), names), without(stock(), names)
    file = io.BytesIO()
    torch.save(mine, file)
    file.seek(0)
    for each in (mine.float().double(), copy.deepcopy(mine), torch.load(file, weights_only=False)):
        assert each.state_dict().keys() == other.state_dict().keys()
        each.load_state_dict(other.state_dict())
        assert all(getattr(each[0], name) is None for name in names)


@pytest.mark.parametrize("names", MISSING, ids=", ".join)
def test_revert_leaves_nothing_of_what_was_listed_for_ddp(names: tuple[str, ...]) -> None:
    mine = distnorm.revert(without(converted(stock()), names))
    assert vars(mine).keys() == vars(stock()).keys()
