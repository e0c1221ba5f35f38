"""The ledger: collectives and bytes, by layer and by step, on threaded ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import distnorm
from distnorm import Ledger
from distnorm.methods import RMS, BatchNorm, Method
from distnorm.policies import AllReduce, Chain, Local, Periodic, Policy
from distnorm.recipe import Recipe
from tests.support.fake import fake_world
from tests.support.threads import run_threads

CHANNELS = {"0": 3, "2.1": 5}
STEPS = 3
KINDS = {BatchNorm: 2, RMS: 1}


def model(policy: Policy, method: Method | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    part = nn.Sequential(nn.ReLU(), nn.BatchNorm1d(5))
    stock = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5), part)
    return distnorm.convert(stock, Recipe(method=method or BatchNorm(), policy=policy))


def steps(net: nn.Module, count: int = STEPS) -> None:
    for _ in range(count):
        net(torch.randn(4, 3).requires_grad_()).square().sum().backward()


def counted(rank: int, policy: Policy, method: Method | None = None) -> Ledger:
    net = model(policy, method)
    with Ledger(net) as ledger:
        steps(net)
    return ledger


def payload(channels: int, kinds: int) -> int:
    """Bytes of one step: sums and their count forward, cotangents backward, in float64."""
    return 8 * (kinds * channels + 1) + 8 * kinds * channels


@pytest.mark.parametrize("method", [BatchNorm(), RMS()], ids=repr)
def test_counts_and_bytes_by_layer_and_step(method: Method) -> None:
    for ledger in run_threads(2, counted, AllReduce(), method):
        expected = {name: payload(channels, KINDS[type(method)]) for name, channels in CHANNELS.items()}
        assert {name: tally.collectives for name, tally in ledger.layers.items()} == dict.fromkeys(CHANNELS, 2 * STEPS)
        assert {name: tally.bytes for name, tally in ledger.layers.items()} == {
            name: STEPS * nbytes for name, nbytes in expected.items()
        }
        assert {step: tally.collectives for step, tally in ledger.steps.items()} == dict.fromkeys(range(STEPS), 4)
        assert {tally.bytes for tally in ledger.steps.values()} == {sum(expected.values())}
        assert (ledger.collectives, ledger.bytes) == (4 * STEPS, STEPS * sum(expected.values()))


@pytest.mark.parametrize(
    ("policy", "world_size", "collectives"),
    [
        (Local(), 2, {}),
        (AllReduce(group_size=1), 2, {}),
        (AllReduce(group_size=2), 4, {0: 4, 1: 4, 2: 4}),
        (AllReduce(), 1, {}),
        (Chain(AllReduce(group_size=2), Local()), 2, {0: 4, 1: 4, 2: 4}),
        (Chain(AllReduce(), AllReduce()), 2, {0: 8, 1: 8, 2: 8}),
        (Periodic(every=2), 2, {0: 4, 2: 4}),
    ],
    ids=repr,
)
def test_every_policy_counts_what_it_sends(policy: Policy, world_size: int, collectives: dict[int, int]) -> None:
    for ledger in run_threads(world_size, counted, policy):
        assert {step: tally.collectives for step, tally in ledger.steps.items()} == collectives
        assert ledger.collectives == sum(collectives.values())
        assert bool(ledger.bytes) is bool(collectives)


def test_a_process_that_is_alone_counts_nothing() -> None:
    ledger = counted(0, AllReduce())
    assert (ledger.collectives, ledger.bytes, ledger.seconds) == (0, 0, 0.0)
    assert not ledger.layers and not ledger.steps


def _backward_twice(rank: int) -> list[int]:
    net = model(AllReduce())
    with Ledger(net) as ledger:
        y = net(torch.randn(4, 3).requires_grad_()).square().sum()
        y.backward(retain_graph=True)
        y.backward()
        steps(net, 1)
    return [tally.collectives for tally in ledger.steps.values()] + list(ledger.steps)


def test_cotangents_count_for_the_step_of_their_forward_and_every_pass_ends_one() -> None:
    assert run_threads(2, _backward_twice) == [[6, 4, 0, 2]] * 2


def test_a_fake_world_of_64_counts_once_per_layer_and_direction() -> None:
    with fake_world(64):
        ledger = counted(0, AllReduce())
    assert ledger.collectives == 2 * len(CHANNELS) * STEPS


def _around_a_block(rank: int) -> tuple[int, int, list[int]]:
    net = model(AllReduce())
    steps(net, 1)
    ledger = Ledger(net)
    steps(net, 1)
    with ledger:
        steps(net, 1)
    inside = ledger.collectives
    steps(net, 1)
    return inside, ledger.collectives, list(ledger.steps)


def test_nothing_is_counted_outside_of_the_block() -> None:
    assert run_threads(2, _around_a_block) == [(4, 4, [2])] * 2


def _in_two_blocks(rank: int) -> tuple[int, int]:
    net = model(AllReduce())
    with Ledger(net) as outer:
        with Ledger(net[2]) as inner:  # the conversion is watched as a whole
            steps(net, 1)
        with pytest.raises(KeyError), inner:
            raise KeyError("out")
        steps(net, 1)
        with inner:
            steps(net, 1)
    return outer.collectives, inner.collectives


def test_blocks_nest_end_on_errors_and_go_on() -> None:
    assert run_threads(2, _in_two_blocks) == [(12, 8)] * 2


@pytest.mark.parametrize(
    ("what", "collectives"),
    [
        (lambda net: net.eval()(torch.randn(4, 3)), 0),
        (distnorm.attach, 0),
        (distnorm.sync_running_stats, 0),
        (lambda net: torch.no_grad()(net)(torch.randn(4, 3)), 2),
        (lambda net: net(torch.randn(4, 3)), 2),
        (lambda net: net(torch.randn(4, 3).requires_grad_()).sum().backward(), 4),
        (lambda net: net(torch.empty(0, 3).requires_grad_()).sum().backward(), 4),
    ],
    ids=["evaluation", "attach", "sync_running_stats", "no_grad", "forward", "backward", "empty batch"],
)
def test_what_counts(what: Callable[[nn.Module], object], collectives: int) -> None:
    def work(rank: int) -> int:
        net = model(AllReduce())
        with Ledger(net) as ledger:
            what(net)
        return ledger.collectives

    assert run_threads(2, work) == [collectives] * 2


def test_time_and_table() -> None:
    ledger = run_threads(2, counted, AllReduce())[0]
    assert ledger.seconds > 0
    assert ledger.seconds == pytest.approx(sum(tally.seconds for tally in ledger.layers.values()))
    header, *rows, total = str(ledger).splitlines()
    assert header.split() == ["layer", "collectives", "bytes", "seconds"]
    assert [row.split()[:3] for row in rows] == [
        [name, str(2 * STEPS), str(STEPS * payload(channels, 2))] for name, channels in CHANNELS.items()
    ]
    assert total.split()[:3] == ["total", str(ledger.collectives), str(ledger.bytes)]
    assert len({len(line) for line in (header, *rows, total)}) == 1


def test_asynchronous_collectives_count_when_they_start() -> None:
    """All of a block's steps are its own, also the last one, whose sum is still under way."""

    def run(rank: int) -> list[int]:
        model = distnorm.convert(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), "lazy_bn", warmup=0)
        counts = []
        for _ in range(3):
            with distnorm.Ledger(model) as ledger:
                model(torch.ones(2, 3) * rank).sum().backward()
            counts.append(ledger.collectives)
        return counts

    assert run_threads(2, run) == [[1, 1, 1]] * 2
