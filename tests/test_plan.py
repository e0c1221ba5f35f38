"""distnorm plan: its arithmetic against sums written out here, its counts against real ranks."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import final

import pytest
import torch
from torch import Tensor, nn

import distnorm
from distnorm import method_recipes
from distnorm.attach import conversions_of
from distnorm.diagnostics.plan import DEFAULT_RECIPES, Prediction, make_plan, predict
from distnorm.diagnostics.plan_cost import Algorithm, Network, Point, Reach, fit, weights
from distnorm.diagnostics.plan_traffic import traffic
from distnorm.methods import BatchNorm
from distnorm.policies import AllReduce, Chain, Facts, Periodic, Policy, Reducer
from distnorm.transport import Topology
from distnorm.types import Layout, Slot
from tests.support.pool import Pool

CHANNELS = (4, 6, 9000)  # the last one's forward, 144,008 bytes, and backward go by all_reduce on gloo
NETWORK = Network(
    overhead=1e-4,
    message=3e-6,
    wake=7e-5,
    alpha=2e-5,
    inverse_beta=1e-10,
    alpha_node=5e-5,
    inverse_beta_node=1e-9,
)
STEP = 0.1


def model(channels: tuple[int, ...] = CHANNELS) -> nn.Sequential:
    return nn.Sequential(*(nn.BatchNorm1d(each) for each in channels))


def layers(channels: tuple[int, ...] = CHANNELS) -> list[tuple[str, nn.modules.batchnorm._BatchNorm]]:
    net = distnorm.convert(model(channels), "sync_bn")  # which keeps its layers alive
    (conversion,) = conversions_of(net)
    return list(conversion.layers())


def foreseen(recipe: str, world: int, local: int = 8, backend: str = "gloo", network: Network = NETWORK) -> Prediction:
    return predict(recipe, layers(), world, local, network, backend, STEP)  # type: ignore[arg-type]


def payloads(kinds: int = 2) -> list[int]:
    """Bytes of every blocking sum of a step: float64 sums with a count forward, cotangents backward."""
    return [8 * (kinds * c + 1) for c in CHANNELS] + [8 * kinds * c for c in CHANNELS]


# --- the formula, written out ---------------------------------------------------------------------------------------


def test_sync_bn_on_gloo_between_two_nodes() -> None:
    total = 0.0
    for nbytes in payloads():
        if nbytes <= 131072:  # to 15 peers: 7 in the node; 8 others through a link that 8 ranks of the node use
            total += 1e-4 + 15 * 3e-6 + 5e-5 + 7 * nbytes * 1e-10 + 8 * 8 * nbytes * 1e-9
        else:  # gloo's ring: 30 rounds there and back; the link carries 30/16 of the vector
            total += 30 * (7e-5 + 2 * 5e-5) + 30 / 16 * nbytes * 1e-9
    found = foreseen("sync_bn", 16)
    assert found.blocking_seconds == pytest.approx(total, rel=1e-12)
    assert found.exposed_seconds == found.blocking_seconds
    assert (found.blocking, found.background, found.nbytes) == (6, 0, sum(payloads()))
    assert found.exact and found.covers_all


def test_hierarchical_bn_on_gloo() -> None:
    total = 0.0
    for nbytes in payloads():
        if nbytes <= 131072:
            total += 1e-4 + 7 * 3e-6 + 2e-5 + 7 * nbytes * 1e-10
            total += 1e-4 + 3 * 3e-6 + 5e-5 + 8 * 3 * nbytes * 1e-9  # 8 groups of 4 share each link
        else:
            total += 14 * (7e-5 + 2 * 2e-5) + 14 / 8 * nbytes * 1e-10
            total += 6 * (7e-5 + 2 * 5e-5) + 8 * 6 / 4 * nbytes * 1e-9
    found = foreseen("hierarchical_bn", 32)
    assert found.blocking_seconds == pytest.approx(total, rel=1e-12)
    assert (found.blocking, found.nbytes) == (12, 2 * sum(payloads()))
    assert found.exact


def test_a_group_in_a_node_costs_the_same_on_any_number_of_nodes() -> None:
    small = [nbytes for nbytes in payloads() if nbytes <= 131072]
    big = [nbytes for nbytes in payloads() if nbytes > 131072]
    total = sum(1e-4 + 3 * 3e-6 + 2e-5 + 3 * nbytes * 1e-10 for nbytes in small)
    total += sum(6 * (7e-5 + 2 * 2e-5) + 6 / 4 * nbytes * 1e-10 for nbytes in big)
    for world in (8, 4096):
        found = foreseen("group_bn(size=4)", world)
        assert found.blocking_seconds == pytest.approx(total, rel=1e-12)
        assert not found.exact and not found.covers_all


def test_sync_bn_on_nccl_takes_the_faster_of_ring_and_tree() -> None:
    total = 0.0
    for nbytes in payloads():
        ring = 1e-4 + 2 * 63 * 5e-5 + 2 * 63 / 64 * nbytes * 1e-9
        tree = 1e-4 + 2 * 7 * 2e-5 + 2 * 3 * 5e-5 + 2 * nbytes * (1e-10 + 1e-9)
        total += min(ring, tree)
    assert foreseen("sync_bn", 64, backend="nccl").blocking_seconds == pytest.approx(total, rel=1e-12)


def test_periodic_bn_is_an_average_over_its_period() -> None:
    exact, found = foreseen("sync_bn", 16), foreseen("periodic_bn(every=5)", 16)
    assert found.blocking == pytest.approx(6 / 5)
    assert found.exposed_seconds == pytest.approx(exact.exposed_seconds / 5)
    assert found.nbytes == pytest.approx(exact.nbytes / 5)
    assert not found.exact and found.covers_all


@pytest.mark.parametrize(("recipe", "kinds", "extra"), [("mabn", 1, 0), ("lazy_bn", 2, 1)])
def test_moving_recipes_send_one_vector_beside_the_step(recipe: str, kinds: int, extra: int) -> None:
    # values and, for lazy_bn, a count per layer; a weight per layer and direction; the number of backward passes
    nbytes = 8 * (2 * kinds * sum(CHANNELS) + extra * len(CHANNELS) + 2 * len(CHANNELS) + 1)
    found = foreseen(recipe, 16)
    assert found.background_seconds == pytest.approx(30 * (7e-5 + 2 * 5e-5) + 30 / 16 * nbytes * 1e-9, rel=1e-12)
    assert (found.blocking, found.background, found.nbytes) == (0, 1, nbytes)
    assert found.exposed_seconds == 0 and found.covers_all and not found.exact


def test_what_outlasts_the_step_is_exposed() -> None:
    def found(recipe: str, step: float) -> Prediction:
        return predict(recipe, layers(), 16, 8, NETWORK, "gloo", step)

    took = found("mabn", STEP).background_seconds
    assert found("mabn", took).exposed_seconds == 0
    assert found("mabn", took / 4).exposed_seconds == pytest.approx(took * 3 / 4)
    # The blocking collectives of hierarchical_mabn lengthen the step that hides the other one.
    both = found("hierarchical_mabn", 1e-9)
    assert both.background_seconds > both.blocking_seconds > 0
    assert both.exposed_seconds == pytest.approx(both.background_seconds - 1e-9)
    assert found("hierarchical_mabn", 1.0).exposed_seconds == both.blocking_seconds


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("recipe", DEFAULT_RECIPES)
def test_cost_never_falls_with_ranks_or_a_slower_network(recipe: str, backend: str) -> None:
    costs = [foreseen(recipe, world, backend=backend).exposed_seconds for world in (1, 2, 8, 64, 512)]
    assert costs == sorted(costs) and costs[0] == 0
    for name in ("overhead", "message", "wake", "alpha", "inverse_beta", "alpha_node", "inverse_beta_node"):
        slower = dataclasses.replace(NETWORK, **{name: 10 * getattr(NETWORK, name)})
        assert foreseen(recipe, 64, backend=backend, network=slower).exposed_seconds >= costs[3]


# --- counts, against real ranks -------------------------------------------------------------------------------------

COUNTED = (
    "local_bn",
    "sync_bn",
    "group_bn(size=2)",
    "hierarchical_bn",
    "periodic_bn(every=2)",
    "mabn(warmup=0, window=2)",
    "hierarchical_mabn(warmup=0, window=2)",
    "lazy_bn(warmup=0)",
)
SMALL = (3, 5, 7)


def count_on_a_rank(rank: int) -> dict[str, tuple[float, float]]:
    """Collectives and bytes per step, over two steps after two others, in which windows fill."""
    found = {}
    for recipe in COUNTED:
        net = nn.Sequential(*(part for c in SMALL for part in (nn.LazyLinear(c), nn.BatchNorm1d(c))))
        net(torch.ones(2, 4))
        distnorm.convert(net, distnorm.recipes.parse(recipe))
        for _ in range(2):
            net(torch.randn(4, 4)).square().sum().backward()
        with distnorm.Ledger(net) as ledger:
            for _ in range(2):
                net(torch.randn(4, 4)).square().sum().backward()
        found[recipe] = ledger.collectives / 2, ledger.bytes / 2
    return found


@pytest.mark.parametrize("local", [1, 2])
def test_counts_and_bytes_are_those_of_a_ledger_on_two_real_ranks(pool: Pool, local: int) -> None:
    counted = pool.run(2, count_on_a_rank, env=[{"GROUP_RANK": str(rank // local)} for rank in range(2)])
    assert counted[0] == counted[1]
    assert counted[0]["sync_bn"] == (6, 8 * sum(4 * c + 1 for c in SMALL))
    for recipe in COUNTED:
        found = predict(recipe, layers(SMALL), 2, local, NETWORK, "gloo", STEP)
        assert (found.blocking + found.background, found.nbytes) == counted[0][recipe], recipe


@final
@dataclass(frozen=True, kw_only=True)
class Twice(Policy):
    """A policy of the user's: everything is summed over neighbours, twice."""

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        group = topology.blocks(2)

        class Summing(Reducer):
            def reduce(self, payload: Tensor, slot: Slot) -> Tensor:
                return group.sum(group.sum(payload, slot), slot)

        return Summing(2)

    @property
    def facts(self) -> Facts:
        return Facts(collectives=2.0)


def test_a_policy_of_the_users_is_planned_by_running_it() -> None:
    recipe = distnorm.Recipe(
        method=BatchNorm(), policy=Chain(Twice(), Periodic(every=4, policy=AllReduce(axis="node")))
    )
    sent = traffic(recipe, layers(SMALL), 16, 8)
    assert sent.period == 4
    assert sent.collectives(background=False) == 2 * 6 + 6 / 4
    assert {each.reach for each in sent.sent} == {Reach(2, 1, 8), Reach(2, 2, 8)}


# --- fitting --------------------------------------------------------------------------------------------------------


GLOO: tuple[Algorithm, ...] = ("exchange", "gloo_ring")
NCCL: tuple[Algorithm, ...] = ("ring", "tree")


def made_up(network: Network, reaches: list[Reach], algorithms: tuple[Algorithm, ...] = GLOO) -> list[Point]:
    return [
        Point(algorithm, reach, nbytes, network.seconds(weights(algorithm, reach, nbytes)))
        for reach in reaches
        for algorithm in algorithms
        for nbytes in (1024, 65536, 1 << 20)
    ]


@pytest.mark.parametrize(("algorithms", "absent"), [(GLOO, ["overhead"]), (NCCL, ["message", "wake"])])
def test_a_fit_finds_the_network_that_made_the_points(algorithms: tuple[Algorithm, ...], absent: list[str]) -> None:
    network = dataclasses.replace(NETWORK, **dict.fromkeys(absent, 0.0))
    found = fit(made_up(network, [Reach(16, 2, 8), Reach(8, 1, 8), Reach(2, 2, 8), Reach(2, 1, 8)], algorithms))
    for field in dataclasses.fields(Network):
        assert getattr(found, field.name) == pytest.approx(getattr(network, field.name), rel=1e-6), field.name


def test_overhead_counts_as_part_of_the_one_round_of_an_exchange() -> None:
    reach, network = Reach(2, 1, 2), dataclasses.replace(NETWORK, overhead=1e-5)
    points = made_up(network, [reach])
    found = fit(points, message=network.message)
    assert found.overhead == 0
    for point in points:
        assert found.seconds(weights(point.algorithm, reach, point.nbytes)) == pytest.approx(point.seconds)


def test_two_ranks_tell_rounds_from_waking_up_and_leave_the_message_as_assumed() -> None:
    network = dataclasses.replace(NETWORK, message=2e-6, overhead=0.0)
    found = fit(made_up(network, [Reach(2, 1, 2)]), message=2e-6)
    assert found.wake == pytest.approx(network.wake)
    assert found.alpha == pytest.approx(network.alpha) == found.alpha_node
    assert found.inverse_beta == pytest.approx(network.inverse_beta) == found.inverse_beta_node


def test_no_number_of_a_fit_is_negative() -> None:
    slow_exchange = [Point("exchange", Reach(2, 1, 2), 1024, 2e-3), Point("gloo_ring", Reach(2, 1, 2), 1024, 1e-3)]
    found = fit(slow_exchange)
    assert all(value >= 0 for value in dataclasses.astuple(found))
    assert 1e-3 < found.seconds(weights("exchange", Reach(2, 1, 2), 1024)) < 2e-3
    with pytest.raises(ValueError, match="no points to fit"):
        fit([])


def test_all_recipes_are_planned_up_to_4096_ranks() -> None:
    network = Network(alpha=3e-5, inverse_beta=1e-10, alpha_node=3e-5, inverse_beta_node=1e-10)
    plan = make_plan(
        "m",
        layers(SMALL),
        names=DEFAULT_RECIPES,
        worlds=[64, 4096],
        local=8,
        network=network,
        backend="nccl",
        step_seconds=1,
    )
    assert len(plan.predictions) == 2 * len(DEFAULT_RECIPES)
    others = {name for name in vars(method_recipes) if not name.startswith("_")}  # methods that share as one of these
    named = {each.name for each in distnorm.recipes.available()}
    assert {name.partition("(")[0] for name in DEFAULT_RECIPES} == named - others
    assert all(math.isfinite(each.exposed_seconds) for each in plan.predictions)
    json.dumps(plan.record())
