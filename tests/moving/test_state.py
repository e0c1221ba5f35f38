"""Saving and resuming moving statistics: bit for bit, warm, or cold, and never in the way of training."""

from __future__ import annotations

import io
import logging
from typing import Any

import pytest
import torch
from torch import nn

import distnorm
from distnorm import Recipe
from distnorm.methods import RMS, BatchNorm
from distnorm.policies import AllReduce, Chain, Moving, Policy, StaleMix, Warmup
from tests.moving.models import Trace, batch, build, loss_of, same, train
from tests.support.threads import run_threads

RECIPES = {
    "Moving": Recipe(method=RMS(), policy=Moving(window=4)),
    "Moving-1": Recipe(method=RMS(), policy=Moving(window=1)),
    "blocking": Recipe(method=RMS(), policy=Moving(window=4, staleness=0)),
    "StaleMix": Recipe(method=BatchNorm(), policy=StaleMix(window=2)),
    "Warmup": Recipe(method=RMS(clip=5.0, clip_after=4), policy=Warmup(then=Moving(window=3), steps=3), momentum=0.02),
    "Warmup-later": Recipe(method=RMS(), policy=Warmup(then=StaleMix(), steps=7)),
    "Chain": Recipe(method=BatchNorm(), policy=Chain(AllReduce(), Moving(window=3, axis="local"))),
    "centralized": Recipe(method=RMS(), policy=Moving(window=4), weights="centralized"),
}
EVERY = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
State = tuple[dict[str, Any], list[dict[str, Any]]]


def save(model: nn.Module) -> bytes:
    """As a checkpoint file."""
    file = io.BytesIO()
    torch.save((model.state_dict(), distnorm.state_dict(model)), file)
    return file.getvalue()


def load(model: nn.Module, saved: bytes) -> None:
    model_state, ours = torch.load(io.BytesIO(saved), weights_only=True)
    model.load_state_dict(model_state)
    distnorm.load_state_dict(model, ours)


def _straight(rank: int, recipe: Recipe) -> Trace:
    return train(build(recipe), rank, range(10))[5:]


def _interrupted(rank: int, recipe: Recipe, bind_first: bool) -> Trace:
    model = build(recipe)
    train(model, rank, range(5))
    saved = save(model)
    resumed = build(recipe)
    if bind_first:
        train(resumed, rank, range(20, 23))  # what it was before must not matter
    load(resumed, saved)
    return train(resumed, rank, range(5, 10))


@EVERY
@pytest.mark.parametrize("bind_first", [False, True])
def test_resuming_goes_on_bit_for_bit(recipe, bind_first):
    """In the middle of a window, with a vector in flight, on ranks that save each its own state."""
    same(run_threads(3, _interrupted, recipe, bind_first), run_threads(3, _straight, recipe))


@EVERY
def test_saving_and_evaluating_change_nothing(recipe):
    def run(rank: int) -> Trace:
        model = build(recipe)
        trace: Trace = []
        for step in range(10):
            trace += train(model, rank, range(step, step + 1))
            model.eval()
            model(batch(step, rank)).sum().backward()
            model.train()
            save(model)
            distnorm.stats(model, exact=True)
        return trace[5:]

    same(run_threads(2, run), run_threads(2, _straight, recipe))


def test_saving_in_the_middle_of_a_step_changes_nothing():
    """Between two backward passes of one optimizer step; the outbox is part of the state."""
    recipe = RECIPES["Moving"]

    def run(rank: int, interrupt: bool) -> list[torch.Tensor]:
        model = build(recipe)
        distnorm.attach(model, manual=True)
        seen = []
        for step in range(6):
            for half in range(2):
                y = model(batch(2 * step + half, rank))
                loss_of(y).backward()
                seen.append(y.detach())
                if interrupt and step == 3 and half == 0:
                    saved = save(model)
                    model = build(recipe)
                    distnorm.attach(model, manual=True)
                    load(model, saved)
            distnorm.end_step(model)
        return seen

    same(run_threads(2, run, True), run_threads(2, run, False))


def _first_file(recipe: Recipe, world_size: int) -> bytes:
    def run(rank: int) -> bytes:
        model = build(recipe)
        train(model, rank, range(6))
        return save(model)

    return run_threads(world_size, run)[0]


def _messages(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@EVERY
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_warm_start_from_the_first_ranks_state(recipe, world_size, caplog):
    """At this or another world size; every rank but the writer says so, and nobody complains of anything else."""
    saved = _first_file(recipe, 2)
    caplog.clear()
    caplog.set_level(logging.INFO, "distnorm")

    def run(rank: int) -> tuple[list[float], Trace]:
        model = build(recipe)
        distnorm.attach(model)
        load(model, saved)
        entries = [value for key, value in distnorm.stats(model).items() if key.endswith("/entries")]
        return entries, train(model, rank, range(6, 11))

    results = run_threads(world_size, run)
    warm = [record for record in caplog.records if "starts warm from the state of rank 0 of 2" in record.getMessage()]
    assert len(warm) == (world_size - 1 if world_size == 2 else world_size)
    # Threaded ranks share autograd's numbers of passes, which tell real ranks whether they are in phase.
    warned = {record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING}
    assert all("end their steps at different times" in message for message in warned), warned
    for entries, trace in results:
        assert entries == results[0][0]
        for one, other in zip(trace, results[0][1], strict=True):
            for name in one:
                assert one[name].isfinite().all()
                if "running" in name:
                    same(one[name], other[name])


def test_a_window_that_starts_warm_holds_what_it_held(caplog):
    saved = _first_file(RECIPES["Moving"], 2)

    def run(rank: int) -> dict[str, float]:
        model = build(RECIPES["Moving"])
        load(model, saved)
        train(model, rank, range(6, 7))
        return distnorm.stats(model)

    for stats in run_threads(4, run):
        assert stats["0.1/entries"] == 3


def test_a_cold_start_is_logged_once_per_rank(caplog):
    caplog.set_level(logging.INFO, "distnorm")
    run_threads(2, lambda rank: train(build(RECIPES["Moving"]), rank, range(2)))
    assert _messages(caplog).count("moving statistics start cold") == 2
    caplog.clear()
    run_threads(2, lambda rank: train(build(Recipe(method=BatchNorm(), policy=AllReduce())), rank, range(2)))
    assert "cold" not in _messages(caplog)


def test_a_state_of_other_conversions_is_refused():
    model = build(RECIPES["Moving"])
    train(model, 0, range(2))
    state = distnorm.state_dict(model)
    for wrong in ([], state * 2):
        with pytest.raises(ValueError, match=f"of the model, 1 in all, .* got {len(wrong)} states"):
            distnorm.load_state_dict(model, wrong)
    with pytest.raises(ValueError, match="no converted layer"):
        distnorm.state_dict(nn.Linear(2, 2))


def _worn() -> nn.BatchNorm2d:
    generator = torch.Generator().manual_seed(2)
    layer = nn.BatchNorm2d(3).double()
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(layer, name).copy_(torch.rand(3, generator=generator, dtype=torch.float64) + 0.5)
    return layer


def test_a_stock_checkpoint_evaluates_as_it_did_until_training_goes_on():
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stock = _worn().eval()
    layer = distnorm.convert(nn.BatchNorm2d(3).double(), "mabn")
    layer.load_state_dict(stock.state_dict(), strict=True)
    layer.eval()
    expected = stock(x)
    torch.testing.assert_close(layer(x), expected)
    layer.train()
    layer(x).sum().backward()
    square = stock.running_var + stock.running_mean.square()
    torch.testing.assert_close(layer.running_var, 0.98 * square + 0.02 * x.square().mean((0, 2, 3)))
    assert not layer.running_mean.any()


@pytest.mark.parametrize("look", [distnorm.state_dict, distnorm.stats, distnorm.sync_running_stats])
def test_looking_at_a_stock_checkpoint_does_not_change_its_evaluation(look):
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stock = _worn().eval()
    layer = distnorm.convert(nn.BatchNorm2d(3).double(), "mabn")
    layer.load_state_dict(stock.state_dict())
    look(layer)
    layer.eval()
    torch.testing.assert_close(layer(x), stock(x))


def test_an_optimizer_ends_a_step_once_however_often_it_is_attached():
    model = build(Recipe(method=RMS(), policy=Moving(window=3)), layers=1)
    optimizer, other = (torch.optim.SGD(model.parameters(), 0.1) for _ in range(2))
    for _ in range(3):
        distnorm.attach(model, optimizer=optimizer)
    distnorm.attach(model, optimizer=other)
    loss_of(model(batch(0, 0))).backward()
    optimizer.step()
    assert distnorm.state_dict(model)[0]["step"] == 1
    other.step()
    assert distnorm.state_dict(model)[0]["step"] == 2


@pytest.mark.parametrize("policy", [Moving(window=3), Moving(window=1), StaleMix(window=2)], ids=str)
def test_layers_read_and_write_in_one_place_for_ever(policy: Policy, entries: None) -> None:
    """A CUDA graph that was captured in one step is replayed in all later ones, while steps end outside of it."""
    model = build(Recipe(method=RMS(), policy=policy))
    places = []
    for step in range(6):
        loss_of(model(batch(step, 0))).backward()
        reducer = model[0][1]._site.conversion.bound().reducer
        used = [reducer.bucket.outbox, reducer.entries.sums, reducer.entries.filled]
        places.append([each.data_ptr() for each in (*used, *([reducer.others] if hasattr(reducer, "others") else []))])
    assert all(each == places[0] for each in places)
