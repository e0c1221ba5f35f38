"""Moving as a part: between nodes, and after a synchronous warm-up."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import distnorm
from distnorm import Recipe
from distnorm.methods import RMS, BatchNorm
from distnorm.policies import AllReduce, Chain, Local, Moving, Policy, StaleMix, Warmup
from tests.laws.ranks import nodes_by_local
from tests.moving.plans import C, Plan, follow, make_layer, run_calls
from tests.moving.written_out import Answer, Call, Windows, assert_all_close, draw
from tests.support.threads import run_threads

METHODS = st.sampled_from([RMS(), BatchNorm()])
SEEDS = st.integers(0, 2**16)


def mesh() -> object:
    return nodes_by_local(4)


def _plan(seed: int, ranks: int, steps: int) -> Plan:
    """One call per rank and step, of 1 to 4 values."""
    generator = torch.Generator().manual_seed(seed)
    size = lambda: 1 + int(torch.randint(4, (), generator=generator))  # noqa: E731
    calls = [[[draw(generator, size(), C, at / 4 + rank / 3)] for rank in range(ranks)] for at in range(steps)]
    return Plan(calls, [None] * steps)


def _joined(calls: list[list[Call]], node: int) -> list[Call]:
    """The two ranks of a node as one."""
    mine = [calls[rank][0] for rank in (2 * node, 2 * node + 1)]
    return [Call(torch.cat([call.x for call in mine]), torch.cat([call.dy for call in mine]))]


def _window_between_nodes(plan: Plan, policy: Moving, method: object) -> list[list[Answer]]:
    """Each node as one rank of a window."""
    layer = make_layer(Recipe(method=method, policy=policy))
    windows = Windows(
        method, policy.window, policy.staleness, policy.loss_reduction, C, layer.weight.detach(), layer.bias.detach()
    )
    return [
        [answers[0] for answers in windows.step([_joined(calls, node) for node in range(2)])] for calls in plan.steps
    ]


@pytest.mark.parametrize("staleness", [0, 1])
@settings(max_examples=15)
@given(method=METHODS, reduction=st.sampled_from(["mean", "sum"]), seed=SEEDS, window=st.integers(1, 3))
def test_exact_in_the_node_and_a_window_between(staleness, method, reduction, seed, window):
    plan = _plan(seed, 4, 6)
    moving = Moving(window=window, staleness=staleness, axis="node", loss_reduction=reduction)
    recipe = Recipe(method=method, policy=Chain(AllReduce(axis="local"), moving))
    found = run_threads(4, follow, plan, recipe, mesh)
    for at, per_node in enumerate(_window_between_nodes(plan, moving, method)):
        for node, expected in enumerate(per_node):
            mine = [found[rank].answers[at][0] for rank in (2 * node, 2 * node + 1)]
            joined = Answer(torch.cat([each.y for each in mine]), torch.cat([each.dx for each in mine]))
            assert_all_close(joined, expected)
    for other in found[1:]:
        torch.testing.assert_close(other.running, found[0].running, rtol=0, atol=0)


THEN: dict[str, Policy] = {
    "Moving": Moving(window=3),
    "Moving-1": Moving(window=1),
    "Moving-sum": Moving(window=3, loss_reduction="sum"),
    "blocking": Moving(window=3, staleness=0),
    "blocking-sum": Moving(window=3, staleness=0, loss_reduction="sum"),
    "StaleMix": StaleMix(),
    "Chain-Moving": Chain(AllReduce(axis="local"), Moving(window=3, axis="node")),
    "Chain-Moving-sum": Chain(AllReduce(axis="local"), Moving(window=3, axis="node", loss_reduction="sum")),
    "Chain-StaleMix": Chain(AllReduce(axis="local"), StaleMix(axis="node")),
    "Chain-StaleMix-first": Chain(StaleMix(axis="node"), AllReduce(axis="local")),
}


@pytest.mark.parametrize("then", THEN.values(), ids=THEN.keys())
@settings(max_examples=6)
@given(method=METHODS, seed=SEEDS)
def test_what_warmup_hands_over_is_to_scale(then, method, seed):
    """Nodes with equal batches, repeated: after the switch as before it, every step is exact."""
    generator = torch.Generator().manual_seed(seed)
    node = [[draw(generator, 4, C, rank / 2)] for rank in range(2)]
    steps = [node * 2] * 7 if isinstance(then, Chain) else [[node[0]] * 4] * 7
    plan = Plan(steps, [None] * 7)
    policies = [Warmup(then=then, steps=4), AllReduce()]
    found, exact = (run_threads(4, follow, plan, Recipe(method=method, policy=policy), mesh) for policy in policies)
    assert_all_close([mine.answers for mine in found], [right.answers for right in exact])


@pytest.mark.parametrize("staleness", [0, 1])
@settings(max_examples=15)
@given(seed=SEEDS, steps=st.integers(1, 5))
def test_the_first_windowed_step_uses_the_warm_ups_entries(staleness, seed, steps):
    """Its window: the newest, and the last global means of the warm-up."""
    window, plan = 3, _plan(seed, 2, steps + 1)
    policy = Warmup(then=Moving(window=window, staleness=staleness), steps=steps)
    found = run_threads(2, follow, plan, Recipe(method=RMS(), policy=policy))
    joined = [torch.cat([calls[0].x for calls in step]).square().mean(0) for step in plan.steps]
    layer = make_layer(Recipe(method=RMS(), policy=Local()))
    for rank, mine in enumerate(found):
        x = plan.steps[-1][rank][0].x
        newest = x.square().mean(0) if staleness else joined[-1]
        used = torch.stack([*joined[:-1][-(window - 1) :], newest]).mean(0)
        expected = x / (used + 1e-5).sqrt() * layer.weight.detach() + layer.bias.detach()
        assert_all_close(mine.answers[-1][0].y, expected)


@given(seed=SEEDS)
@settings(max_examples=10)
def test_the_warm_up_is_the_first_policy(seed):
    """Bit for bit in every respect, running statistics included; the step after it is another one's."""
    plan = _plan(seed, 2, 4)
    policies: list[Policy] = [Warmup(then=Moving(window=2), steps=3), AllReduce()]
    found, exact = (run_threads(2, follow, plan, Recipe(method=BatchNorm(), policy=policy)) for policy in policies)
    for mine, right in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.answers[:3], right.answers[:3], rtol=0, atol=0)
        torch.testing.assert_close(mine.running[:3], right.running[:3], rtol=0, atol=0)
        assert not torch.allclose(mine.answers[3][0].y, right.answers[3][0].y)


def test_no_warm_up_steps_means_none():
    plan = _plan(0, 2, 4)
    found, bare = (
        run_threads(2, follow, plan, Recipe(method=RMS(), policy=policy))
        for policy in (Warmup(then=Moving(window=2), steps=0), Moving(window=2))
    )
    torch.testing.assert_close(found, bare, rtol=0, atol=0)


def test_a_backward_belongs_to_the_step_of_its_forward():
    """A forward in the last warm-up step whose backward comes after the switch: still synchronous, and exact."""
    plan = _plan(3, 2, 2)

    def run(rank: int, policy: Policy) -> Tensor:
        layer = make_layer(Recipe(method=RMS(), policy=policy))
        distnorm.attach(layer, manual=True)
        run_calls(layer, plan.steps[0][rank])
        call = plan.steps[1][rank][0]
        x = call.x.clone().requires_grad_()
        y = layer(x)
        distnorm.end_step(layer)
        return torch.autograd.grad(y, x, call.dy)[0]

    late, exact = (run_threads(2, run, policy) for policy in (Warmup(then=Moving(), steps=1), AllReduce()))
    assert_all_close(late, exact)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Moving(window=0), "Moving(window=0): need a whole number of steps, at least 1"),
        (lambda: Moving(window=2.0), "Moving(window=2.0): need a whole number"),
        (lambda: Moving(window="16"), "Moving(window='16')"),
        (
            lambda: Moving(staleness=2),
            "Moving(staleness=2): need a whole number of steps in flight",
        ),
        (lambda: Moving(staleness=-1), "Moving(staleness=-1)"),
        (lambda: Moving(loss_reduction="none"), "Moving(loss_reduction='none')"),
        (lambda: Warmup(then=Moving(), steps=-1), "Warmup(steps=-1): need a whole number of steps, at least 0"),
        (lambda: Warmup(then=Moving(), steps=1.5), "Warmup(steps=1.5)"),
        (lambda: Warmup(then="moving"), "Warmup(then='moving'): need a distnorm policy"),
        (lambda: Warmup(first=None, then=Moving()), "Warmup(first=None): need a distnorm policy"),
        (lambda: Warmup(first=Moving(), then=Moving()), "need an exact policy, such as AllReduce()"),
        (lambda: RMS(clip=0.5), "RMS(clip=0.5): need a number, at least 1 and at most 1000000 or None"),
        (lambda: RMS(clip_after=-1), "RMS(clip_after=-1)"),
        (lambda: distnorm.recipes.mabn(window=0), "window=0"),
        (lambda: distnorm.recipes.lazy_bn(warmup=-1), "lazy_bn(warmup=-1)"),
        (lambda: Recipe(method=RMS(), policy=Moving(), momentum=0.0), "Recipe(momentum=0.0)"),
    ],
)
def test_values_out_of_range_are_named(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_the_named_hierarchical_recipe():
    recipe = distnorm.recipes.hierarchical_mabn(window=8, warmup=10)
    chain = Chain(AllReduce(axis="local"), Moving(window=8, axis="node"))
    assert recipe.policy == Warmup(then=chain, steps=9)
    facts = recipe.policy.facts
    assert (facts.collectives, facts.background, facts.staleness) == (1.0, 1.0, 1)
