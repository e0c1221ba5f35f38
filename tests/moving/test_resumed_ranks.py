"""Ranks resume one step or none: what a state brings decides which collectives a rank issues."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distnorm
from distnorm import Recipe
from distnorm.attach import conversions_of
from distnorm.methods import RMS, BatchNorm
from distnorm.policies import AllReduce, Moving, Periodic, StaleMix, Warmup
from tests.moving.models import Trace, build, same, shared_state, train
from tests.moving.test_feeders import addition, batch, loss_of, made, plain
from tests.support.threads import run_threads

RECIPES = {
    "Moving": Recipe(method=RMS(), policy=Moving(window=4)),
    "StaleMix": Recipe(method=BatchNorm(), policy=StaleMix(window=2)),
    "Warmup": Recipe(method=RMS(), policy=Warmup(then=Moving(window=3), steps=4)),  # cold ranks would go on warming up
    "Periodic": Recipe(method=BatchNorm(), policy=Periodic(every=4)),  # and share in other steps
}
EVERY = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def saved(recipe: Recipe, steps: int) -> list[Any]:
    """By rank, the values and the state after some steps."""

    def run(rank: int) -> Any:
        model = build(recipe)
        train(model, rank, range(steps))
        return model.state_dict(), distnorm.state_dict(model)

    return run_threads(2, run)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    texts = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    return [text for text in texts if "end their steps at different times" not in text]


@EVERY
@pytest.mark.parametrize("loads", [0, 1])
def test_a_state_on_one_rank_starts_all_of_them_cold(recipe, loads, caplog):
    files = saved(recipe, 5)

    def run(rank: int, resume: bool) -> Trace:
        model = build(recipe)
        model.load_state_dict(files[0][0])
        if resume and rank == loads:
            distnorm.load_state_dict(model, files[rank][1])
        return train(model, rank, range(5, 10))

    same(run_threads(2, run, True), run_threads(2, run, False))
    told = warnings_in(caplog)
    assert len(told) == 2 and len(set(told)) == 1
    assert "all ranks start without a saved state" in told[0]
    assert f"ranks [{loads}] have one of step 5" in told[0] and f"ranks [{1 - loads}] have none" in told[0]


@EVERY
def test_states_of_different_steps_start_all_ranks_cold(recipe, caplog):
    early, late = saved(recipe, 3), saved(recipe, 6)

    def run(rank: int, resume: bool) -> Trace:
        model = build(recipe)
        model.load_state_dict(late[0][0])
        if resume:
            distnorm.load_state_dict(model, (late if rank else early)[rank][1])
        return train(model, rank, range(6, 11))

    same(run_threads(2, run, True), run_threads(2, run, False))
    assert "ranks [0] have one of step 3, ranks [1] have one of step 6" in warnings_in(caplog)[0]


@pytest.mark.parametrize("loads", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("how", [addition, plain])
@pytest.mark.parametrize("bound", [False, True])
def test_what_one_rank_knows_of_feeders_reaches_all(how, loads, bound, caplog):
    """A rank that knows from a state which weights are centred still answers those that look."""
    recipe = Recipe(method=BatchNorm(), policy=AllReduce(), weights="centralized")

    def straight(rank: int) -> Any:
        model = trained(distnorm.convert(made(how), recipe), range(3))
        return model.state_dict(), distnorm.state_dict(model)

    files = run_threads(2, straight)

    def resumed(rank: int) -> nn.Module:
        model = distnorm.convert(made(how), recipe)
        model.load_state_dict(files[0][0])
        if bound:
            distnorm.attach(model)
        if rank in loads:
            distnorm.load_state_dict(model, files[rank][1])
        return trained(model, range(3, 6))

    models = run_threads(2, resumed)
    expected = {"one"} if how is addition else set()
    for model in models:
        assert conversions_of(model)[0].feeders.left == expected
        same(weights_of(model), weights_of(models[0]))


def trained(model: nn.Module, steps: range) -> nn.Module:
    """With gradients of all ranks, since a rank that looks computes with the guess in its first forward pass."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in steps:
        optimizer.zero_grad()
        loss_of(model(batch(step))).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
    return model


def weights_of(model: nn.Module) -> list[Tensor]:
    return [each.detach().clone() for each in model.parameters()]


@pytest.mark.parametrize("steps", [2, 6])
@pytest.mark.parametrize("recipe", [RECIPES["Moving"], RECIPES["Warmup"]], ids=["Moving", "Warmup"])
def test_between_steps_rank_0s_state_is_every_ranks_state(recipe, steps):
    """With ``Moving``, all that is a rank's own is its part of the step that is under way."""
    files = saved(recipe, steps)

    def straight(rank: int) -> Trace:
        return train(build(recipe), rank, range(steps + 4))[steps:]

    def resumed(rank: int) -> tuple[Trace, Any]:
        model = build(recipe)
        model.load_state_dict(files[0][0])
        distnorm.load_state_dict(model, files[0][1])
        distnorm.attach(model)
        windows = shared_state(model)
        for name, values in files[rank][0].items():  # parameters differ between ranks: nobody averages gradients here
            model.state_dict()[name].copy_(values)
        return train(model, rank, range(steps, steps + 4)), windows

    found = run_threads(2, resumed)
    same([trace for trace, _ in found], run_threads(2, straight))
    same(found[1][1], found[0][1])
    same([state[0]["reducer"] for _, state in files], [windows[0] for _, windows in found])


def test_of_the_stale_mix_the_own_part_is_missing():
    """A rank's own part of the vector in flight is known to it alone: the next entry holds the parts of all ranks."""
    recipe = RECIPES["StaleMix"]
    files = saved(recipe, 4)

    def resumed(rank: int) -> Any:
        model = build(recipe)
        model.load_state_dict(files[0][0])
        distnorm.load_state_dict(model, files[0][1])
        distnorm.attach(model)
        return shared_state(model)[0]

    first, second = run_threads(2, resumed)
    same(first, files[0][1][0]["reducer"])
    assert "sent" in first and "sent" not in second
    same({**second, "sent": first["sent"]}, first)
