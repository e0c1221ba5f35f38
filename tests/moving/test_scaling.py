"""Moving against windows written out as lists: unequal and empty batches, skipped layers, several calls, two losses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distnorm import Recipe
from distnorm.methods import RMS, BatchNorm, Method
from distnorm.policies import AllReduce, Moving, Policy
from tests.moving.plans import C, Plan, Seen, follow, make_layer, make_plan
from tests.moving.written_out import Step, Windows, assert_all_close, draw
from tests.support.threads import run_threads

pytestmark = pytest.mark.usefixtures("entries")


def write_out(plan: Plan, ranks: int, method: Method, policy: Moving) -> list[Seen]:
    model = make_layer(Recipe(method=method, policy=policy))
    weight, bias = model.weight.detach(), model.bias.detach()
    windows = Windows(method, policy.window, policy.staleness, policy.loss_reduction, C, weight, bias)
    seen = [Seen([], [], []) for _ in range(ranks)]
    for calls, extra in zip(plan.steps, plan.extras, strict=True):
        answers = windows.step(calls)
        ys = [None] * ranks if extra is None else windows.without_gradient(extra)
        for rank, mine in enumerate(seen):
            mine.answers.append(answers[rank])
            mine.extras.append(ys[rank])
            mine.running.append((windows.running.mean, windows.running.var))
    return seen


METHODS = st.sampled_from([RMS(), BatchNorm()])
REDUCTIONS = st.sampled_from(["mean", "sum"])
SEEDS = st.integers(0, 2**16)
WORLDS = st.integers(1, 4)


@pytest.mark.parametrize("staleness", [0, 1])
@settings(max_examples=40)
@given(method=METHODS, reduction=REDUCTIONS, seed=SEEDS, ranks=WORLDS, window=WORLDS)
def test_moving_is_what_is_written_out(staleness, method, reduction, seed, ranks, window):
    policy = Moving(window=window, staleness=staleness, loss_reduction=reduction)
    plan = make_plan(seed, ranks, together=staleness == 0)
    found = run_threads(ranks, follow, plan, Recipe(method=method, policy=policy))
    assert_all_close(found, write_out(plan, ranks, method, policy))


@given(method=METHODS, reduction=REDUCTIONS, seed=SEEDS, ranks=WORLDS)
def test_a_blocking_window_of_one_is_exact(method, reduction, seed, ranks):
    """Outputs, gradients and running statistics, whatever the sizes."""
    plan = make_plan(seed, ranks, together=True)
    policies: list[Policy] = [Moving(window=1, staleness=0, loss_reduction=reduction), AllReduce()]
    plan = plan._replace(steps=[step for step in plan.steps if _counts_everywhere(step)])
    plan = plan._replace(extras=plan.extras[: len(plan.steps)])
    one, other = (run_threads(ranks, follow, plan, Recipe(method=method, policy=policy)) for policy in policies)
    assert_all_close(one, other, 1e-11)


def _counts_everywhere(step: Step) -> bool:
    """Whether no call has a single value over all ranks, which an exact policy refuses."""
    return all(sum(len(call.x) for call in together) != 1 for together in zip(*step, strict=True))


@pytest.mark.parametrize("staleness", [0, 1])
@settings(max_examples=15)
@given(method=METHODS, reduction=REDUCTIONS, seed=SEEDS, ranks=WORLDS, window=WORLDS)
def test_law_4_a_constant_input_ends_up_exact(staleness, method, reduction, seed, ranks, window):
    """The same input in every step and on all ranks: once the window is full, nothing tells it from AllReduce."""
    call = draw(torch.Generator().manual_seed(seed), 4, C, 0.5)
    steps = [[[call] for _ in range(ranks)] for _ in range(window + 3)]
    plan = Plan(steps, [None] * len(steps))
    moving = Moving(window=window, staleness=staleness, loss_reduction=reduction)
    found, exact = (
        run_threads(ranks, follow, plan, Recipe(method=method, policy=policy)) for policy in (moving, AllReduce())
    )
    for mine, right in zip(found, exact, strict=True):
        assert_all_close(mine.answers[window + 1 :], right.answers[window + 1 :], 1e-10)


@settings(max_examples=15)
@given(method=METHODS, seed=SEEDS, ranks=WORLDS, window=WORLDS)
def test_law_4_a_blocking_window_of_constant_batches_is_exact(method, seed, ranks, window):
    """Staleness 0 needs no equal inputs on the ranks, only the same ones in every step; sizes differ."""
    generator = torch.Generator().manual_seed(seed)
    step = [[draw(generator, 2 + rank, C, 0.5)] for rank in range(ranks)]
    plan = Plan([step] * (window + 2), [None] * (window + 2))
    policies: list[Policy] = [Moving(window=window, staleness=0), AllReduce()]
    one, other = (run_threads(ranks, follow, plan, Recipe(method=method, policy=policy)) for policy in policies)
    assert_all_close(one, other, 1e-10)


def test_a_step_without_any_values_leaves_the_window_as_it_is():
    """No rank had values: no entry, no running statistics, and the window goes on where it was."""
    generator = torch.Generator().manual_seed(0)
    full = [[draw(generator, 3, C, rank / 2)] for rank in range(2)]
    empty: Step = [[draw(generator, 0, C, 0.0)] for _ in range(2)]
    recipe = Recipe(method=RMS(), policy=Moving(window=3))
    plans = [Plan(steps, [None] * len(steps)) for steps in ([full] * 4, [full, full, empty, empty, full, full])]
    plain, gaps = (run_threads(2, follow, plan, recipe) for plan in plans)
    for one, other in zip(plain, gaps, strict=True):
        assert_all_close(one.running[-1], other.running[-1])


def test_a_step_that_every_rank_skips_leaves_the_window_as_it_is():
    generator = torch.Generator().manual_seed(0)
    steps = [[[draw(generator, 3, C, 0.3)] for _ in range(2)] for _ in range(4)]
    recipe = Recipe(method=RMS(), policy=Moving(window=2, staleness=0))
    gapped = [*steps[:2], [[], []], *steps[2:]]
    plain = run_threads(2, follow, Plan(steps, [None] * 4), recipe)
    gaps = run_threads(2, follow, Plan(gapped, [None] * 5), recipe)
    for one, other in zip(plain, gaps, strict=True):
        assert_all_close(one.answers, other.answers[:2] + other.answers[3:])
