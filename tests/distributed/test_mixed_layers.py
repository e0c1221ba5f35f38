"""Ranks that run different layers at the same time: an error on all of them that names these, on every transport."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distnorm
from tests.support.pool import Pool

C = 4
WAYS = ["shm", "sockets", "gloo"]


class Branches(nn.Module):
    """Norms of equal width, run in the order that is asked for."""

    def __init__(self, features: int = C) -> None:
        super().__init__()
        self.left, self.right, self.wide = nn.BatchNorm1d(C), nn.BatchNorm1d(C), nn.BatchNorm1d(features)

    def forward(self, x: Tensor, order: str) -> Tensor:
        for name in order.split():
            x = getattr(self, name)(x)
        return x


def run(rank: int, orders: list[str]) -> None:
    torch.manual_seed(rank)
    model = distnorm.convert(Branches(), "sync_bn")
    model(torch.randn(8, C), "left right").sum().backward()  # all alike, at first
    model(torch.randn(8, C), orders[rank]).sum().backward()


def expect(outcomes: list[Any], *words: str) -> None:
    for outcome in outcomes:
        assert isinstance(outcome, RuntimeError), outcome
        assert "share different layers at the same time" in str(outcome)
        for word in words:
            assert word in str(outcome)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("orders", "words"),
    [
        (["left", "right"], ["rank 0: the forward statistics of left", "rank 1: the forward statistics of right"]),
        (["left right", "right left"], ["rank 0: the forward statistics of left", "rank 1: the forward statist"]),
        (["left right"] * 2 + ["left left"], ["ranks 0, 1: the forward statistics of right", "rank 2: the forward st"]),
        (["left right", "left right left"], ["rank 0: the backward statistics of right", "rank 1: the forward stat"]),
    ],
    ids=["branches", "order", "third", "direction"],
)
def test_layers_of_equal_width(pool: Pool, way: str, orders: list[str], words: list[str]) -> None:
    environment = {"DISTNORM_TRANSPORT": way}
    if "backward" in words[0] and way == "gloo":  # what gloo exchanges must have one length
        environment["DISTNORM_CHECK"] = "1"
    outcomes = pool.run_all(len(orders), run, orders, env=lambda rank: environment, timeout=60.0)
    expect(outcomes, *words)


def run_two_models(rank: int) -> None:
    models = [distnorm.convert(nn.Sequential(nn.BatchNorm1d(C)), "sync_bn") for _ in range(2)]
    for each in models:
        each(torch.randn(8, C))
    if rank == 1:
        distnorm.convert(nn.Sequential(nn.BatchNorm1d(C)), "sync_bn")  # one that is never bound does not count
    models[rank](torch.randn(8, C))


@pytest.mark.parametrize("way", WAYS)
def test_layers_of_one_name_in_two_models(pool: Pool, way: str) -> None:
    outcomes = pool.run_all(2, run_two_models, env=lambda rank: {"DISTNORM_TRANSPORT": way}, timeout=60.0)
    expect(outcomes, "the forward statistics of 0", "rank 1: the forward statistics of 0 in model")


def go_on(rank: int) -> Tensor:
    """After an error that all ranks have seen they are in step."""
    model = distnorm.convert(Branches(), "sync_bn").double()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="share different layers"):
            model(torch.randn(8, C).double(), "left" if rank else "right")
    x = torch.full((2, C), float(rank), dtype=torch.float64)
    return model(x, "wide")


@pytest.mark.parametrize("way", WAYS)
def test_ranks_stay_in_step(pool: Pool, way: str) -> None:
    stock = nn.BatchNorm1d(C).double()(torch.tensor([0.0, 0, 1, 1], dtype=torch.float64)[:, None].expand(4, C))
    found = pool.run(2, go_on, env=lambda rank: {"DISTNORM_TRANSPORT": way})
    torch.testing.assert_close(torch.cat(found), stock)


def run_checked(rank: int, what: str) -> None:
    width = 20_000 if what == "large" else C
    model = distnorm.convert(nn.ModuleList([nn.BatchNorm1d(width), nn.BatchNorm1d(width)]), "sync_bn")
    wide = distnorm.convert(nn.Sequential(nn.BatchNorm1d(2 * C)), "sync_bn")
    distnorm.attach(model)
    distnorm.attach(wide)
    if what == "length" and rank == 1:
        wide(torch.randn(8, 2 * C))
    else:
        model[rank if what == "large" else 0](torch.randn(8, width))


@pytest.mark.parametrize("what", ["large", "length"])
def test_a_checked_schedule(pool: Pool, what: str) -> None:
    """Where messages cannot say whose they are, or gloo would end the process."""
    environment = {"DISTNORM_TRANSPORT": "gloo", "DISTNORM_CHECK": "1"}
    outcomes = pool.run_all(2, run_checked, what, env=lambda rank: environment, timeout=60.0)
    expect(outcomes, "rank 0: the forward statistics of 0", "values of torch.float64", "rank 1: the forward statistics")


def train_checked(rank: int) -> None:
    model = distnorm.convert(Branches(), "mabn")
    for _ in range(3):
        model(torch.randn(8, C), "left right").sum().backward()


def test_a_checked_schedule_that_holds(pool: Pool) -> None:
    pool.run(2, train_checked, env=lambda rank: {"DISTNORM_CHECK": "1"})


def test_a_check_that_does_not_exist(pool: Pool) -> None:
    outcomes = pool.run_all(2, train_checked, env=lambda rank: {"DISTNORM_CHECK": "yes"}, timeout=60.0)
    assert ["environment DISTNORM_CHECK='yes': allowed are" in str(each) for each in outcomes] == [True, True]
