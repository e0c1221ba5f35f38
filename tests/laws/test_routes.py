"""Which ranks a policy joins: what follows for running statistics, warm-ups and explicit process groups."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import distnorm
from distnorm import Recipe
from distnorm.methods import RMS, BatchNorm, Method
from distnorm.policies import AllReduce, Chain, Facts, Local, Moving, Periodic, Policy, Reducer, StaleMix, Warmup
from distnorm.transport import Topology
from distnorm.types import Layout, Slot
from tests.laws.ranks import nodes_by_local
from tests.moving.models import batch, build, same, train
from tests.support.threads import run_threads, run_threads_all

LOCAL, NODE = AllReduce(axis="local"), AllReduce(axis="node")


def norm(policy: Policy, method: Method | None = None, mesh: DeviceMesh | None = None) -> nn.BatchNorm1d:
    """A float64 layer of 4 channels under ``policy``."""
    recipe = Recipe(method=method or BatchNorm(), policy=policy)
    return distnorm.convert(nn.BatchNorm1d(4).double(), recipe, mesh=mesh)


# By policy, whether running statistics are equal on all ranks at all times.
AGREEING: dict[str, tuple[Policy, bool]] = {
    "AllReduce": (AllReduce(), True),
    "Local": (Local(), False),
    "group": (AllReduce(group_size=2), False),
    "whole group": (AllReduce(group_size=4), True),
    "two hops": (Chain(LOCAL, NODE), True),
    "the same hop twice": (Chain(LOCAL, LOCAL), False),
    "blocks twice": (Chain(AllReduce(group_size=2), AllReduce(group_size=2)), False),
    "all twice": (Chain(AllReduce(), AllReduce()), True),
    "Periodic": (Periodic(every=2), True),
    "Periodic, group": (Periodic(every=2, policy=LOCAL), False),
    "Periodic hop": (Chain(LOCAL, Periodic(every=2, policy=NODE)), True),
    "Local first": (Warmup(first=Local(), then=AllReduce(), steps=2), False),
    "Periodic first": (Warmup(first=Periodic(every=2), then=AllReduce(), steps=3), True),
    "groups first": (Warmup(first=LOCAL, then=AllReduce(), steps=2), False),
    "groups then": (Warmup(first=AllReduce(), then=LOCAL, steps=2), False),
    "other groups then": (Warmup(first=NODE, then=LOCAL, steps=2), False),
    "exact first": (Warmup(first=Chain(LOCAL, NODE), then=Periodic(every=3), steps=2), True),
    "Moving": (Moving(window=2), True),
    "Moving in groups": (Moving(window=2, axis="local"), False),
    "Moving between nodes": (Chain(LOCAL, Moving(window=2, axis="node")), True),
    "Moving before a hop": (Chain(Moving(window=2, axis="node"), LOCAL), False),
    "Moving after a periodic hop": (Chain(Periodic(every=2, policy=LOCAL), Moving(window=2, axis="node")), False),
    "blocking, between nodes": (Chain(LOCAL, Moving(window=2, axis="node", staleness=0)), True),
    "mabn": (Warmup(then=Moving(window=2), steps=2), True),
    "lazy_bn": (Warmup(then=StaleMix(), steps=2), True),
    "mabn in groups": (Warmup(first=LOCAL, then=Moving(window=2, axis="local"), steps=2), False),
    "warm-ups in a row": (Warmup(then=Warmup(then=Moving(window=2), steps=3), steps=1), True),
    "a hop that warms up": (Chain(LOCAL, Warmup(first=NODE, then=Moving(window=2, axis="node"), steps=2)), True),
    "a hop of its own at first": (Chain(LOCAL, Warmup(first=Local(), then=NODE, steps=2)), False),
}


@pytest.mark.parametrize(("policy", "agrees"), AGREEING.values(), ids=AGREEING.keys())
def test_running_statistics_are_united_wherever_they_can_differ(policy: Policy, agrees: bool) -> None:
    """Six steps; then the mean over ranks of means and of var + mean^2, by hand."""

    def run(rank: int) -> tuple[bool, list[list[Tensor]], list[Tensor], int]:
        layer = norm(policy, mesh=nodes_by_local(4))
        history = []
        for step in range(6):
            layer(batch(step, rank).requires_grad_()).square().sum().backward()
            history.append([layer.running_mean.clone(), layer.running_var.clone()])
        with distnorm.Ledger(layer) as ledger:
            distnorm.sync_running_stats(layer)
        united = [layer.running_mean.clone(), layer.running_var.clone()]
        return layer._site.conversion.bound().agrees, history, united, ledger.collectives

    found = run_threads(4, run)
    assert {each[0] for each in found} == {agrees}
    if agrees:
        for _, history, united, _ in found:
            same(history, found[0][1])
            same(united, history[-1])
        return
    assert any(not torch.equal(each[1][-1][0], found[0][1][-1][0]) for each in found)
    means, variances = (torch.stack([each[1][-1][at] for each in found]) for at in range(2))
    mean = means.mean(0)
    var = (variances + means.square()).mean(0) - mean.square()
    for *_, united, _ in found:
        torch.testing.assert_close(united, [mean, var])


# --- warm-ups ------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", [Moving(), StaleMix(), Chain(LOCAL, Moving(axis="node"))], ids=repr)
@pytest.mark.parametrize(
    "first",
    [Local(), Periodic(every=2), Chain(LOCAL, Periodic(every=3, policy=NODE)), Chain(Local(), Local())],
    ids=repr,
)
def test_a_warm_up_that_shares_nothing_or_not_always_is_refused(first: Policy, then: Policy) -> None:
    with pytest.raises(
        ValueError, match=re.escape(f"Warmup(first={first!r}, then={then!r}): the second policy starts")
    ):
        Warmup(first=first, then=then)


@pytest.mark.parametrize("first", [Local(), Periodic(every=2)], ids=repr)
@pytest.mark.parametrize("then", [AllReduce(), Periodic(every=3)], ids=repr)
def test_policies_without_memory_may_follow_anything(first: Policy, then: Policy) -> None:
    """Each step is that of the policy in charge."""

    def run(rank: int, policy: Policy) -> list[Tensor]:
        layer = norm(policy)
        outputs = []
        for step in range(6):
            y = layer(batch(step, rank).requires_grad_())
            y.square().sum().backward()
            outputs.append(y.detach())
        return outputs

    relayed, early, late = (
        run_threads(2, run, each) for each in (Warmup(first=first, then=then, steps=3), first, then)
    )
    for rank in range(2):
        same(relayed[rank], [*early[rank][:3], *late[rank][3:]])


MISMATCHED: dict[str, Policy] = {
    "fewer": Warmup(first=LOCAL, then=Moving()),
    "more": Warmup(first=AllReduce(), then=Moving(axis="local")),
    "others": Warmup(first=NODE, then=StaleMix(axis="local")),
    "blocks across": Warmup(first=AllReduce(group_size=2), then=Moving(axis="node")),
    "alone": Warmup(first=AllReduce(group_size=1), then=Moving()),
    "twice": Warmup(first=Chain(AllReduce(), AllReduce()), then=Moving()),
    "in a chain": Chain(LOCAL, Warmup(first=LOCAL, then=Moving(axis="node"))),
    "behind another": Warmup(first=AllReduce(), then=Warmup(first=LOCAL, then=Moving())),
    "hidden in another": Warmup(first=Warmup(first=Local(), then=AllReduce(), steps=1), then=Moving()),
}


@pytest.mark.parametrize("policy", MISMATCHED.values(), ids=MISMATCHED.keys())
def test_a_warm_up_among_other_ranks_is_refused_on_every_rank(policy: Policy) -> None:
    def run(rank: int) -> None:
        distnorm.attach(norm(policy, RMS(), mesh=nodes_by_local(4)))

    for outcome in run_threads_all(4, run, timeout=10.0):
        assert isinstance(outcome, ValueError), outcome
        assert "continue those of the warm-up" in str(outcome) and "among the same ranks" in str(outcome)


@pytest.mark.parametrize("name", sorted(set(MISMATCHED) - {"blocks across"}))  # blocks of two need two ranks
def test_one_rank_takes_every_warm_up(name: str) -> None:
    train(build(Recipe(method=RMS(), policy=MISMATCHED[name])), 0, range(3))


@pytest.mark.parametrize("first", [AllReduce(group_size=4), Chain(LOCAL, NODE), Chain(NODE, LOCAL)], ids=repr)
def test_the_same_ranks_in_other_words_are_accepted(first: Policy) -> None:
    """And the windows they fill are those that a warm-up by ``AllReduce`` fills."""

    def run(rank: int, by: Policy) -> list[Tensor]:
        policy = Warmup(first=by, then=Moving(window=3), steps=3)
        layer = norm(policy, RMS(), mesh=nodes_by_local(4))
        for step in range(5):
            layer(batch(step, rank).requires_grad_()).square().sum().backward()
        return list(distnorm.state_dict(layer)[0]["reducer"]["then"]["window"].values())

    torch.testing.assert_close(run_threads(4, run, first), run_threads(4, run, AllReduce()))


class Halved(Policy):
    """A policy of the user's that does not say whom it joins."""

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        group = topology.everyone()

        class Summing(Reducer):
            def reduce(self, payload: Tensor, slot: Slot) -> Tensor:
                return group.sum(payload, slot)

        return Summing(group.size)

    @property
    def facts(self) -> Facts:
        return Facts(collectives=1.0)


def test_a_policy_that_does_not_say_whom_it_joins() -> None:
    """Its running statistics are united; a warm-up refuses it, on every rank alike, but not on one alone."""

    def run(rank: int, policy: Policy) -> bool:
        layer = norm(policy, RMS())
        distnorm.attach(layer)
        return layer._site.conversion.bound().agrees

    assert run_threads(2, run, Halved()) == [False, False]
    for outcome in run_threads_all(2, run, Warmup(first=Halved(), then=Moving()), timeout=10.0):
        assert isinstance(outcome, ValueError) and "Define its reducer's routes()" in str(outcome)
    assert run(0, Warmup(first=Halved(), then=Moving()))
