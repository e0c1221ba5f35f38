"""One collective per step whatever the number of layers, equal state on all ranks, and what can be seen of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import distnorm
from distnorm import Ledger, Recipe
from distnorm.methods import RMS, BatchNorm
from distnorm.policies import AllReduce, Chain, Moving, Policy, StaleMix, Warmup
from tests.laws.ranks import nodes_by_local
from tests.moving.models import batch, build, loss_of, same, train
from tests.support.fake import fake_world
from tests.support.threads import run_threads

ASYNCHRONOUS: dict[str, Policy] = {"Moving": Moving(window=3), "StaleMix": StaleMix(window=2)}
EVERY = pytest.mark.parametrize("policy", ASYNCHRONOUS.values(), ids=ASYNCHRONOUS.keys())
STEPS = 5


def _per_step(rank: int, recipe: Recipe, layers: int) -> list[int]:
    """Collectives of each of the first steps; the one that a step leaves in flight is counted when it is waited for."""
    model = build(recipe, layers=layers)
    with Ledger(model) as ledger:
        train(model, rank, range(STEPS + 1))
    return [ledger.steps[step].collectives for step in range(STEPS)]


@EVERY
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("layers", [1, 6])
def test_one_collective_per_step(policy, world_size, layers):
    recipe = Recipe(method=BatchNorm(), policy=policy)
    assert run_threads(world_size, _per_step, recipe, layers) == [[1] * STEPS] * world_size
    assert (policy.facts.collectives, policy.facts.background) == (0.0, 1.0)


@EVERY
def test_one_collective_per_step_after_the_warm_up(policy):
    recipe = Recipe(method=RMS(), policy=Warmup(then=policy, steps=2))
    for counts in run_threads(2, _per_step, recipe, 3):
        assert counts == [6, 6, 1, 1, 1]
    assert (recipe.policy.facts.collectives, recipe.policy.facts.background) == (0.0, 1.0)


def test_a_blocking_window_needs_one_per_layer_and_direction():
    recipe = Recipe(method=RMS(), policy=Moving(window=3, staleness=0))
    assert run_threads(2, _per_step, recipe, 3) == [[6] * STEPS] * 2


@pytest.mark.parametrize("name", ["mabn", "lazy_bn"])
@pytest.mark.parametrize("layers", [1, 50])
def test_64_ranks(name, layers):
    """With the payload of one step: per layer sums, counts and cotangents, and the number of the step."""
    with fake_world(64):
        recipe = distnorm.recipes.build(name)
        recipe = replace(recipe, policy=recipe.policy.then)
        assert _per_step(0, recipe, layers) == [1] * STEPS
        model = build(recipe, layers=layers)
        with Ledger(model) as ledger:
            train(model, 0, range(3))
        kinds, counts = (1, 2) if name == "mabn" else (2, 3)
        assert ledger.bytes / ledger.collectives == 8 * (layers * (2 * kinds * 4 + counts) + 1)
        assert set(ledger.layers) == {"(all layers)"}


def test_one_rank_needs_none():
    model = build(Recipe(method=RMS(), policy=Moving()))
    with Ledger(model) as ledger:
        train(model, 0, range(4))
    assert ledger.collectives == 0


class Sometimes(nn.Module):
    """Three layers, of which ranks use some."""

    def __init__(self, recipe: Recipe, world_size: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.BatchNorm1d(4).double() for _ in range(3))
        distnorm.convert(self, recipe, mesh=nodes_by_local(world_size))

    def forward(self, x: Tensor, used: list[int]) -> Tensor:
        for number in used:
            x = self.layers[number](x).tanh() + x
        return x


def _skipping(rank: int, recipe: Recipe, world_size: int, seed: int) -> list[tuple[Any, list[Tensor]]]:
    """Completed state and running statistics after every step; no rank uses the same layers twice in a row."""
    model = Sometimes(recipe, world_size)
    distnorm.attach(model, manual=True)
    history = []
    for step in range(10):
        used = [number for number in range(3) if (seed >> (step + 2 * number + 3 * rank)) % 3]
        x = batch(step, rank + seed).requires_grad_()
        y = model(x, used)
        if used:
            loss_of(y).backward()
        distnorm.end_step(model)
        state = distnorm.state_dict(model)[0]["reducer"]
        history.append((_landed(state), [each.clone() for each in model.buffers()]))
    return history


def _landed(state: dict[str, Any]) -> Any:
    """The part of the state that every rank holds alike."""
    if "then" in state:
        return _landed(state["then"])
    return state.get("window", {}), state["bucket"].get("in_flight"), state["bucket"]["dropped"]


@pytest.mark.parametrize("policy", [Moving(window=3), Moving(window=1), StaleMix(), StaleMix(window=3)], ids=repr)
@settings(max_examples=10)
@given(world_size=st.integers(2, 4), seed=st.integers(1, 2**16))
def test_completed_state_is_equal_bit_for_bit(policy, world_size, seed):
    """Whichever rank skips whichever layer; also in single precision, where rounding shows."""
    recipe = Recipe(method=BatchNorm(), policy=policy)
    results = run_threads(world_size, _skipping, recipe, world_size, seed)
    for history in results[1:]:
        same(history, results[0])


def test_skipping_is_no_reason_to_complain(caplog):
    run_threads(2, _skipping, Recipe(method=RMS(), policy=Moving(window=3)), 2, 12345)
    assert not caplog.records


# --- stats ---------------------------------------------------------------------------------------


def _stats(rank: int, policy: Policy, steps: int) -> tuple[dict[str, float], dict[str, float], list[int]]:
    model = distnorm.convert(nn.Sequential(nn.BatchNorm1d(4).double()), Recipe(method=RMS(), policy=policy))
    for step in range(steps):
        model(batch(step, rank).requires_grad_()).square().sum().backward()
    counts = []
    found = []
    for exact in (False, True):
        with Ledger(model) as ledger:
            found.append(distnorm.stats(model, exact=exact))
        counts.append(ledger.collectives)
    return found[0], found[1], counts


def _square(*batches: Tensor) -> Tensor:
    return torch.cat(batches).square().mean(0)


def _distance(given: Tensor, reference: Tensor) -> float:
    return float((given - reference).norm() / reference.norm())


def test_stats_of_a_window():
    """After step 5 the window holds steps 3 and 4; no collective, or one if exact."""
    used = torch.stack([_square(*(batch(step, rank) for rank in range(2))) for step in (3, 4)]).mean(0)
    joined = _square(batch(5, 0), batch(5, 1))
    for rank, (plain, exact, counts) in enumerate(run_threads(2, _stats, Moving(window=3), 6)):
        local = _square(batch(5, rank))
        expected = {"0/local_to_used": _distance(local, used), "0/entries": 2.0, "0/dropped": 0.0}
        assert plain == pytest.approx(expected)
        expected |= {"0/used_to_global": _distance(used, joined), "0/local_to_global": _distance(local, joined)}
        assert exact == pytest.approx(expected)
        assert counts == [0, 1]


def test_stats_of_a_stale_mix():
    """In use after step 5: this rank's step 5 and the other's step 4."""
    for rank, (plain, exact, counts) in enumerate(run_threads(2, _stats, StaleMix(), 6)):
        local, joined = _square(batch(5, rank)), _square(batch(5, 0), batch(5, 1))
        used = _square(batch(5, rank), batch(4, 1 - rank))
        assert plain["0/local_to_used"] == pytest.approx(_distance(local, used))
        assert (plain["0/entries"], plain["0/dropped"]) == (1.0, 0.0)
        assert exact["0/used_to_global"] == pytest.approx(_distance(used, joined))
        assert exact["0/local_to_global"] == pytest.approx(_distance(local, joined))
        assert counts == [0, 1]


def test_stats_fill_up_and_pass_through_warm_up_and_chains():
    for steps, entries in ((1, 1), (2, 2), (3, 2)):
        assert _stats(0, Warmup(then=Moving(window=3), steps=9), steps)[0]["0/entries"] == entries
    assert _stats(0, Chain(AllReduce(), Moving(window=3, axis="local")), 6)[0]["0/entries"] == 2
    assert _stats(0, Moving(window=3), 1)[0]["0/entries"] == 0


def test_exact_policies_have_nothing_to_report():
    assert _stats(0, AllReduce(), 2)[:2] == ({}, {})
    with pytest.raises(ValueError, match="no converted layer"):
        distnorm.stats(nn.Linear(2, 2))
