"""Windows of other sizes are taken over, and so are states of before they had a version."""

from __future__ import annotations

import io
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distnorm
from distnorm import Recipe
from distnorm.attach import conversions_of
from distnorm.methods import RMS, BatchNorm
from distnorm.policies import AllReduce, Chain, Moving, Policy, StaleMix, Warmup
from tests.moving.models import batch, build, loss_of, same, train
from tests.moving.test_state_fits import State, build_stock, converted, unversioned
from tests.support.threads import run_threads


def written(recipe: Recipe, steps: int = 6) -> State:
    model = build(recipe)
    train(model, 0, range(steps))
    return distnorm.state_dict(model)


def of(policy: Policy) -> Recipe:
    return Recipe(method=RMS() if isinstance(policy, Moving | Warmup) else BatchNorm(), policy=policy)


# --- windows of another size ---------------------------------------------------------------------


def ring(state: State) -> dict[str, Tensor]:
    reducer = state[0]["reducer"]
    return reducer["window"] if "window" in reducer else reducer["others"]


def entries_of(stored: dict[str, Tensor], slot: int, span: slice) -> list[Tensor]:
    """Of one slot, the oldest first; told from the ring's definition alone."""
    depth, filled = len(stored["ring"]), int(stored["filled"][slot])
    rows = [(int(stored["position"][slot]) - filled + each) % depth for each in range(filled)]
    return [stored["ring"][row, span] for row in rows]


@pytest.mark.parametrize("policy", [Moving, StaleMix], ids=["Moving", "StaleMix"])
@pytest.mark.parametrize(("before", "after"), [(2, 16), (5, 3), (4, 5), (16, 2), (3, 3), (4, 1), (1, 4)])
@pytest.mark.parametrize("bound", [False, True])
def test_another_window_takes_over_the_newest_entries(policy, before, after, bound):
    state = written(of(policy(window=before)), steps=9)
    model = build(of(policy(window=after)))
    if bound:
        train(model, 0, range(30, 37))
    distnorm.load_state_dict(model, deepcopy(state))
    given, found = ring(state), ring(distnorm.state_dict(model))
    depth = after - 1 if policy is Moving else after
    assert len(found["ring"]) == depth
    sizes = [9, 8, 9, 8] if policy is StaleMix else [4, 4, 4, 4]  # of 4 features, two statistics, and a count
    assert given["ring"].shape[1] == sum(sizes)
    start = 0
    for slot, size in enumerate(sizes):
        span, start = slice(start, start + size), start + size
        kept = entries_of(given, slot, span)[-depth:] if depth else []
        same(entries_of(found, slot, span), kept)
    for seen in train(model, 0, range(9, 20)):
        assert all(values.isfinite().all() for values in seen.values())


def test_a_longer_window_normalizes_by_the_mean_of_what_is_there():
    """The window of 2 that became 15 times too big, against the mean written out."""
    state = written(of(Moving(window=2)), steps=6)
    model = build(of(Moving(window=16)))
    distnorm.load_state_dict(model, state)
    x = batch(6, 0)
    layer, seen = model[0][1], []
    layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    y = []
    layer.register_forward_hook(lambda *given: y.append(given[2].detach()))
    model(x)
    (entry,) = entries_of(ring(state), 0, slice(0, 4))
    square = (entry + seen[0].square().mean(0)) / 2
    expected = seen[0] / (square + layer.eps).sqrt() * layer.weight + layer.bias
    torch.testing.assert_close(y[0], expected.detach())


def test_a_named_recipe_takes_over_another_window_and_warm_up():
    """What was in flight completes, though the longer warm-up is not over yet."""

    def run(rank: int) -> tuple[State, State, State]:
        model = converted(build_stock(), window=2, warmup=1)
        train(model, rank, range(5))
        before = distnorm.state_dict(model)
        longer = converted(build_stock(), window=16)
        distnorm.load_state_dict(longer, before)
        loaded = distnorm.state_dict(longer)
        train(longer, rank, range(5, 7))
        return before, loaded, distnorm.state_dict(longer)

    for before, loaded, after in run_threads(2, run):
        assert before[0]["step"] == 5 and after[0]["step"] == 7
        then = [each[0]["reducer"]["then"] for each in (before, loaded, after)]
        assert [each["window"]["filled"].unique().tolist() for each in then] == [[1], [1], [4]]
        assert ["in_flight" in each["bucket"] for each in then] == [True, True, False]
        completed = then[0]["bucket"]["in_flight"]
        same(then[2]["window"]["ring"][1, :4], completed[:4] / completed[then[0]["window"]["ring"].shape[1]])


def test_windows_of_different_sizes_in_one_file_of_slots_that_filled_differently():
    """A layer that ran in some steps only: slots go on by themselves."""
    recipe = of(Moving(window=6))
    model = build(recipe)
    for step in range(7):
        y = model[0](batch(step, 0))
        loss_of(model[1](y) if step % 3 == 0 else y).backward()
    state = distnorm.state_dict(model)
    assert ring(state)["filled"].tolist() == [5, 5, 2, 2]
    for window in (2, 3, 4, 30):
        other = build(of(Moving(window=window)))
        distnorm.load_state_dict(other, state)
        found = ring(distnorm.state_dict(other))
        for slot in range(4):
            span = slice(4 * slot, 4 * slot + 4)
            same(entries_of(found, slot, span), entries_of(ring(state), slot, span)[1 - window :])


# --- old files -----------------------------------------------------------------------------------


OLD = {
    "Moving": of(Moving(window=4)),
    "Moving-1": of(Moving(window=1)),
    "StaleMix": of(StaleMix(window=2)),
    "Warmup": of(Warmup(then=Moving(window=3), steps=3)),
    "Chain": Recipe(method=BatchNorm(), policy=Chain(AllReduce(), Moving(window=3, axis="local"))),
    "exact": Recipe(method=BatchNorm(), policy=AllReduce()),
}


@pytest.mark.parametrize("recipe", OLD.values(), ids=OLD)
def test_states_without_a_version_go_on_bit_for_bit(recipe):
    def run(rank: int, old: bool) -> Any:
        model = build(recipe)
        train(model, rank, range(5))
        file = io.BytesIO()
        state = distnorm.state_dict(model)
        torch.save((model.state_dict(), [unversioned(each) for each in state] if old else state), file)
        file.seek(0)
        model, (values, state) = build(recipe), torch.load(file, weights_only=True)
        model.load_state_dict(values)
        distnorm.load_state_dict(model, state)
        return train(model, rank, range(5, 9))

    same(run_threads(2, run, True), run_threads(2, run, False))


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_stale_mix_without_a_version_is_one_entry(window, steps):
    """It held the mean of one other rank's newest step in place of entries, and zeros before any had completed."""

    def run(rank: int) -> None:
        model = build(of(StaleMix(window=1)))
        train(model, rank, range(steps))
        new = distnorm.state_dict(model)
        old = [unversioned(each) for each in deepcopy(new)]
        old[0]["reducer"]["others"] = new[0]["reducer"]["others"]["ring"].sum(0)
        other = build(of(StaleMix(window=window)))
        other.load_state_dict(model.state_dict())
        distnorm.load_state_dict(other, old)
        found = ring(distnorm.state_dict(other))
        filled = ring(new)["filled"]
        same(found["filled"], filled)
        assert filled.unique().tolist() == [int(steps > 1)]
        same(found["ring"].sum(0), old[0]["reducer"]["others"])
        if window == 1:
            (before, after) = (train_from(each, rank, steps) for each in (model, other))
            same(after, before)

    run_threads(2, run)


def train_from(model: nn.Module, rank: int, step: int) -> list[Tensor]:
    return [model(batch(each, rank)).detach() for each in range(step, step + 2)]


# --- to the bit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Moving, StaleMix], ids=["Moving", "StaleMix"])
@pytest.mark.parametrize("window", [3, 9, 17])
def test_what_was_loaded_goes_on_to_the_bit(entries, policy, window):
    """Sums over entries are rounded: those of a loaded state must be rounded as those that grew."""

    def resume(rank: int) -> tuple[Tensor, Tensor]:
        straight, resumed = (build(of(policy(window=window))) for _ in range(2))
        train(straight, rank, range(2 * window))
        distnorm.attach(resumed)
        distnorm.load_state_dict(resumed, distnorm.state_dict(straight))
        grown, loaded = (conversions_of(each)[0].bound().reducer.entries.sums for each in (straight, resumed))
        return grown, loaded

    for grown, loaded in run_threads(2, resume):
        assert (grown != 0).all() and torch.equal(grown, loaded)
