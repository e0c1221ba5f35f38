"""StaleMix: the other ranks' newest completed steps and this rank's current one, against the written-out formula."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import distnorm
from distnorm import Recipe
from distnorm.methods import RMS, BatchNorm, Method
from distnorm.policies import AllReduce, Local, Policy, StaleMix, Warmup
from tests.moving.plans import C, Plan, Seen, follow, make_layer, make_plan
from tests.moving.written_out import (
    Answer,
    Call,
    Running,
    Step,
    assert_all_close,
    cotangents,
    draw,
    location_and_scale,
    moments,
)
from tests.support.threads import run_threads

pytestmark = pytest.mark.usefixtures("entries")

METHODS = st.sampled_from([RMS(), BatchNorm()])
SEEDS = st.integers(0, 2**16)
WORLDS = st.integers(1, 4)


def _zero() -> Tensor:
    return torch.zeros(2, C, dtype=torch.float64)


@dataclass
class Part:
    """What one rank adds up in a step."""

    sums: Tensor
    n: float
    cotangents: Tensor
    calls: int

    def plus(self, other: Part, sign: int = 1) -> Part:
        return Part(
            self.sums + sign * other.sums,
            self.n + sign * other.n,
            self.cotangents + sign * other.cotangents,
            self.calls + sign * other.calls,
        )

    def over(self, many: int) -> Part:
        return Part(self.sums / many, self.n / many, self.cotangents / many, 1)


def nothing() -> Part:
    return Part(_zero(), 0, _zero(), 0)


def mean_of(parts: list[Part]) -> Part:
    total = nothing()
    for part in parts:
        total = total.plus(part)
    return total.over(max(len(parts), 1))


class Mix:
    """A layer under ``StaleMix`` on all ranks: mean of total - own, per contribution, and own now."""

    def __init__(self, method: Method, ranks: int, window: int, weight: Tensor, bias: Tensor) -> None:
        self.method, self.ranks, self.window, self.weight, self.bias = method, ranks, window, weight, bias
        self.others: list[list[Part]] = [[] for _ in range(ranks)]
        self.in_flight: list[Part] | None = None
        self.running = Running(torch.zeros(C).double(), torch.ones(C).double())

    def step(self, calls: Step) -> list[list[Answer]]:
        parts = [nothing() for _ in calls]
        answers: list[list[Answer]] = [[] for _ in calls]
        for rank, mine in enumerate(calls):
            for call in mine:
                answer, part = self._call(call, mean_of(self.others[rank]))
                answers[rank].append(answer)
                parts[rank] = parts[rank].plus(part)
        completed, self.in_flight = self.in_flight, parts
        if completed is not None:
            self._complete(completed)
        return answers

    def _call(self, call: Call, others: Part) -> tuple[Answer, Part]:
        n = len(call.x) + others.n
        means = (moments(call.x) + others.sums) / max(n, 1)
        mean, s = location_and_scale(self.method, means)
        z, g = (call.x - mean) / s, call.dy * self.weight
        own = cotangents(self.method, z, s, g)
        shared = (own + others.cotangents) / max(n, 1)
        answer = Answer(z * self.weight + self.bias, g / s + shared[0] + shared[1] * z / s)
        return answer, Part(moments(call.x), len(call.x), own, 1)

    def _complete(self, completed: list[Part]) -> None:
        total = nothing()
        for part in completed:
            total = total.plus(part)
        if not total.calls:
            return
        for rank, own in enumerate(completed):
            rest = total.plus(own, -1)
            if rest.calls:
                self.others[rank].append(rest.over(rest.calls))
                del self.others[rank][: -self.window]
        if total.n:
            self.running.update(self.method, total.sums / total.n, total.n)


def write_out(plan: Plan, ranks: int, method: Method, window: int) -> list[Seen]:
    model = make_layer(Recipe(method=method, policy=StaleMix(window=window)))
    mix = Mix(method, ranks, window, model.weight.detach(), model.bias.detach())
    seen = [Seen([], [], []) for _ in range(ranks)]
    for calls in plan.steps:
        for mine, answers in zip(seen, mix.step(calls), strict=True):
            mine.answers.append(answers)
            mine.extras.append(None)
            mine.running.append((mix.running.mean, mix.running.var))
    return seen


def _constant(seed: int, ranks: int, steps: int) -> Plan:
    """Every rank repeats a batch of its own; sizes differ."""
    generator = torch.Generator().manual_seed(seed)
    step = [[draw(generator, 2 + rank, C, rank / 2)] for rank in range(ranks)]
    return Plan([step] * steps, [None] * steps)


@settings(max_examples=40)
@given(method=METHODS, seed=SEEDS, ranks=WORLDS, window=st.integers(1, 3))
def test_the_mix_is_what_is_written_out(method, seed, ranks, window):
    """Skipped layers, several calls, empty and unequal batches."""
    plan = make_plan(seed, ranks, together=False)
    plan = plan._replace(extras=[None] * len(plan.steps))
    found = run_threads(ranks, follow, plan, Recipe(method=method, policy=StaleMix(window=window)))
    assert_all_close(found, write_out(plan, ranks, method, window), 1e-8)


@settings(max_examples=15)
@given(method=METHODS, seed=SEEDS, ranks=st.integers(1, 2))
def test_without_drift_it_is_exact_once_a_step_has_completed(method, seed, ranks):
    """In outputs and gradients, for two ranks with different batches; before that it is local."""
    plan = _constant(seed, ranks, 5)
    policies: list[Policy] = [StaleMix(), AllReduce(), Local()]
    found, exact, local = (
        run_threads(ranks, follow, plan, Recipe(method=method, policy=policy)) for policy in policies
    )
    for mine, right, alone in zip(found, exact, local, strict=True):
        # Statistics mix from step 2 on; the cotangents that completed then are those of local steps 0 and 1.
        assert_all_close(mine.answers[:2], alone.answers[:2])
        assert_all_close([step[0].y for step in mine.answers[2:]], [step[0].y for step in right.answers[2:]])
        assert_all_close(mine.answers[4:], right.answers[4:])


@settings(max_examples=15)
@given(method=METHODS, seed=SEEDS, ranks=WORLDS, window=st.integers(1, 3), steps=st.integers(1, 3))
def test_warmup_starts_it_warm(method, seed, ranks, window, steps):
    """Equal batches on all ranks: not one step differs from exact synchronization."""
    call = draw(torch.Generator().manual_seed(seed), 3, C, 0.5)
    plan = Plan([[[call]] * ranks] * (steps + 4), [None] * (steps + 4))
    policies: list[Policy] = [Warmup(then=StaleMix(window=window), steps=steps), AllReduce()]
    found, exact = (run_threads(ranks, follow, plan, Recipe(method=method, policy=policy)) for policy in policies)
    for mine, right in zip(found, exact, strict=True):
        assert_all_close(mine.answers, right.answers)


def test_warmup_hands_over_what_one_rank_contributes_on_average():
    """The first mixed step: this rank's batch and an average one of the last warm-up step."""
    generator = torch.Generator().manual_seed(1)
    steps = [[[draw(generator, 2 + rank, C, at / 2)] for rank in range(3)] for at in range(3)]
    recipe = Recipe(method=RMS(), policy=Warmup(then=StaleMix(), steps=2))
    found = run_threads(3, follow, Plan(steps, [None] * 3), recipe)
    layer = make_layer(recipe)
    last = torch.cat([calls[0].x for calls in steps[1]])
    for rank, mine in enumerate(found):
        x = steps[2][rank][0].x
        n = len(x) + len(last) / 3
        square = (x.square().sum(0) + last.square().sum(0) / 3) / n
        expected = x / (square + 1e-5).sqrt() * layer.weight.detach() + layer.bias.detach()
        assert_all_close(mine.answers[2][0].y, expected)


@pytest.mark.parametrize("mean", [0.0, 100.0])
@given(seed=SEEDS, ranks=st.integers(2, 4))
@settings(max_examples=15)
def test_the_variance_is_never_negative(mean, seed, ranks):
    """However ranks drift apart: outputs stay finite, and none exceeds what real batches allow."""
    generator = torch.Generator().manual_seed(seed)
    far = [[[draw(generator, 4, C, mean * at * (rank - 1))] for rank in range(ranks)] for at in range(6)]
    plan = Plan(far, [None] * 6)
    for mine in run_threads(ranks, follow, plan, Recipe(method=BatchNorm(), policy=StaleMix())):
        for step in mine.answers:
            values = step[0].y
            assert values.isfinite().all()
            # n values of one rank among n K: |z| < sqrt(n K), times the largest weight, plus the bias
            assert values.abs().max() < (4 * ranks) ** 0.5 * 1.5 + 1.5
        assert all((var > 0).all() for _, var in mine.running)


def test_a_rank_that_skips_the_layer_counts_for_nothing():
    """The others go on with each other; the absent one is represented by what those that ran contributed on average."""
    generator = torch.Generator().manual_seed(2)
    step = [[draw(generator, 4, C, rank / 3)] for rank in range(3)]
    absent: Step = [*step[:2], []]
    plan = Plan([absent] * 5, [None] * 5)
    found = run_threads(3, follow, plan, Recipe(method=RMS(), policy=StaleMix()))
    x, other = step[0][0].x, step[1][0].x
    square = (x.square().sum(0) + other.square().sum(0)) / 8
    layer = make_layer(Recipe(method=RMS(), policy=Local()))
    expected = x / (square + 1e-5).sqrt() * layer.weight.detach() + layer.bias.detach()
    assert_all_close(found[0].answers[4][0].y, expected)
    assert_all_close(found[0].running, found[2].running, 0)


def test_a_step_that_nobody_used_keeps_what_completed_before():
    generator = torch.Generator().manual_seed(2)
    step = [[draw(generator, 4, C, rank / 3)] for rank in range(2)]
    nobody: Step = [[], []]
    plan = Plan([step, step, step, nobody, nobody, nobody, step], [None] * 7)
    found, exact = (
        run_threads(2, follow, plan, Recipe(method=RMS(), policy=policy)) for policy in (StaleMix(), AllReduce())
    )
    assert_all_close([mine.answers[-1][0].y for mine in found], [right.answers[-1][0].y for right in exact])


def test_a_mean_of_several_steps_stands_for_the_others():
    """A window of 3 in step 5: steps 1 to 3 have completed. This rank's batch keeps the weight of one of two."""
    generator = torch.Generator().manual_seed(3)
    steps = [[[draw(generator, 4, C, rank + at / 2)] for rank in range(2)] for at in range(6)]
    recipe = Recipe(method=RMS(), policy=StaleMix(window=3))
    found = run_threads(2, follow, Plan(steps, [None] * 6), recipe)
    x, old = steps[5][0][0].x, torch.cat([steps[at][1][0].x for at in (1, 2, 3)])
    square = (x.square().mean(0) + old.square().mean(0)) / 2
    layer = make_layer(recipe)
    expected = x / (square + 1e-5).sqrt() * layer.weight.detach() + layer.bias.detach()
    assert_all_close(found[0].answers[5][0].y, expected)


@pytest.mark.parametrize("window", [0, -1, 2.0, True, "8"], ids=repr)
def test_a_window_is_a_whole_number(window):
    with pytest.raises(ValueError, match="window"):
        distnorm.recipes.build("lazy_bn", window=window)


def test_the_named_recipe():
    policy = Warmup(first=AllReduce(), then=StaleMix(window=8), steps=4)
    recipe = distnorm.recipes.build("lazy_bn", warmup=4)
    assert recipe == Recipe(method=BatchNorm(), policy=policy, weights="centralized")
    plain = distnorm.recipes.build("lazy_bn", window=1, warmup=4, weights="none")
    assert plain == Recipe(method=BatchNorm(), policy=Warmup(then=StaleMix(), steps=4))
