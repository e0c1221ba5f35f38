"""BNP on real ranks: it equals training on the joined batch, with one asynchronous collective per step."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm.types import Slot
from tests.preconditioning import reference
from tests.preconditioning.reference import RATE, Net, batch, loss_of
from tests.support.pool import Pool

SIZES = {2: [4, 2], 3: [3, 2, 1]}
"""Samples of each rank, of 6."""
STEPS = 5
PAYLOAD = 8 * (2 * (3 + 4 + 6) + 3)


class Watch:
    """When collectives were issued: in the backward pass, or before the step."""

    def __init__(self) -> None:
        self.place = ""
        self.issued_in: list[tuple[int, str]] = []

    def issued(self, slot: Slot, nbytes: int) -> None:
        self.issued_in.append((slot.step, self.place))

    def waited(self, slot: Slot, seconds: float) -> None:
        pass


class Seen(NamedTuple):
    parameters: dict[str, Tensor]
    bytes: dict[int, int]
    collectives: dict[int, int]
    issued_in: list[tuple[int, str]]


def train(rank: int, sizes: list[int], passes: int) -> Seen:
    """DDP with unequal batches, each rank's in ``passes`` micro-batches; the losses are scaled to those of all."""
    net = Net()
    wrapped = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=RATE)
    handle = distnorm.precondition(wrapped, optimizer, **reference.OPTIONS)
    watch = Watch()
    handle.observers.append(watch)
    with distnorm.Ledger(wrapped) as ledger:
        for step in range(STEPS):
            optimizer.zero_grad()
            x, y = (each.split(sizes)[rank].tensor_split(passes) for each in batch(step))
            for at in range(passes):  # one of them may be without samples
                watch.place = "backward"
                with wrapped.no_sync() if at < passes - 1 else nullcontext():
                    (loss_of(wrapped, x[at], y[at]) * len(sizes) / sum(sizes)).backward()
            watch.place = "step"
            optimizer.step()
    parameters = {name: each.detach().clone() for name, each in net.named_parameters()}
    steps = ledger.steps.items()
    return Seen(
        parameters,
        {step: tally.bytes for step, tally in steps},
        {step: tally.collectives for step, tally in steps},
        watch.issued_in,
    )


@pytest.mark.parametrize(("world_size", "passes"), [(2, 1), (3, 1), (2, 2)])
def test_ranks_equal_the_joined_batch(pool: Pool, world_size: int, passes: int) -> None:
    expected = reference.train(range(STEPS))
    for seen in pool.run(world_size, train, SIZES[world_size], passes):
        torch.testing.assert_close(seen.parameters, expected)
        assert seen.collectives == dict.fromkeys(range(STEPS), 1)
        assert seen.bytes == dict.fromkeys(range(STEPS), PAYLOAD)
        # The first step shows how many backward passes a step has; then sums leave when the last of them begins.
        assert seen.issued_in == [(0, "step"), *((step, "backward") for step in range(1, STEPS))]


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.branch = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, through: bool) -> Tensor:
        x = self.trunk(x)
        return self.branch(x) if through else x


def unlike(rank: int) -> dict[str, Any]:
    """Ranks with different numbers of micro-batches, and a layer that one of them does not use; resuming; removing."""
    net = Branches().double()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    handle = distnorm.precondition(net, optimizer, momentum=0.5)
    generator = torch.Generator().manual_seed(rank)

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad(set_to_none=False)
            for _ in range(1 + rank):
                net(torch.randn(4, 3, generator=generator, dtype=torch.float64), rank == 1).square().mean().backward()
            for each in net.parameters():
                each.grad = torch.zeros_like(each) if each.grad is None else each.grad
                dist.all_reduce(each.grad)
            optimizer.step()

    steps(4)
    saved = handle.state_dict(), {name: each.clone() for name, each in net.state_dict().items()}, generator.get_state()
    steps(3)
    after = {name: each.clone() for name, each in net.state_dict().items()}
    net.load_state_dict(saved[1])
    handle.load_state_dict(saved[0])
    generator.set_state(saved[2])
    steps(3)
    torch.testing.assert_close(dict(net.state_dict()), after, rtol=0, atol=0)
    counts = handle.statistics.count.tolist()
    handle.remove()
    distnorm.precondition(net, optimizer)
    return {"after": after, "counts": counts, "mean": handle.statistics.mean}


def test_ranks_with_unlike_steps_agree_and_resume(pool: Pool) -> None:
    first, second = pool.run(2, unlike)
    assert first["counts"] == [12, 8]
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def differing(rank: int) -> None:
    net = nn.Sequential(nn.Linear(3, 3 + rank))
    distnorm.precondition(net, torch.optim.SGD(net.parameters(), lr=0.1))


def test_ranks_with_other_layers_are_told(pool: Pool) -> None:
    message = (
        "distnorm.precondition: rank 1 preconditions something else than rank 0: [0: Linear [4, 3], groups=1] where "
        "rank 0 has [0: Linear [3, 3], groups=1]. Call it with the same model and options on every rank."
    )
    assert [str(error) for error in pool.run_all(2, differing)] == [message] * 2


def ending_early(rank: int) -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    distnorm.precondition(net, optimizer)
    for step in range(2 - rank):
        loss_of(net, *batch(step)).backward()
        optimizer.step()


def test_a_rank_that_ends_early_is_named(pool: Pool) -> None:
    error, done = pool.run_all(2, ending_early, group_timeout=5.0)
    assert done is None
    assert "sums of layer inputs of step 1 among ranks [0, 1] did not arrive" in str(error)


def early(rank: int) -> str:
    """Called before there is a job: it would stay within one process in silence."""
    world = dist.group.WORLD
    dist.group.WORLD = None
    try:
        net = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        distnorm.precondition(net, optimizer)
    finally:
        dist.group.WORLD = world
    net(torch.ones(1, 2)).sum().backward()
    with pytest.raises(RuntimeError, match="called in another job") as caught:
        optimizer.step()
    return str(caught.value)


def test_a_job_that_begins_later_is_refused(pool: Pool) -> None:
    assert all("again after init_process_group" in message for message in pool.run(1, early))
