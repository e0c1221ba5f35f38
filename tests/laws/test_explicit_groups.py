"""Process groups that a policy names: whom they concern, and what becomes of them in copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distnorm
from distnorm.methods import RMS
from distnorm.policies import AllReduce, Chain, Moving, Periodic, Warmup
from tests.laws.ranks import nodes_by_local
from tests.laws.test_routes import norm
from tests.moving.models import batch, same
from tests.support.threads import run_threads, run_threads_all


def groups_of(rank: int, *partitions: list[list[int]]) -> list[dist.ProcessGroup]:
    """Of every partition, the group that this rank is in."""
    found = []
    for partition in partitions:
        made = {tuple(ranks): dist.new_group(ranks) for ranks in partition}
        found.append(next(group for ranks, group in made.items() if rank in ranks))
    return found


ROWS, COLUMNS = [[0, 1], [2, 3], [4]], [[0, 2], [1, 3], [4]]


def test_chained_groups_concern_the_ranks_that_they_connect() -> None:
    """Ranks 0 to 3 in two hops; rank 4 never binds. Ranks that bind late, or not in this job, are not waited for."""

    def run(rank: int) -> tuple[tuple[int, ...], Tensor, bool] | None:
        rows, columns = groups_of(rank, ROWS, COLUMNS)
        if rank == 4:
            return None
        chain = Chain(AllReduce(process_group=rows), AllReduce(process_group=columns))
        layer = norm(chain)
        y = layer(batch(0, rank).requires_grad_())
        y.square().sum().backward()
        binding = layer._site.conversion.bound()
        distnorm.attach(layer)  # bound already: no walk, no waiting
        return binding.topology.ranks, y.detach(), binding.agrees

    found = run_threads(5, run)
    assert found[4] is None
    joined = torch.cat([batch(0, rank) for rank in range(4)])
    expected = nn.BatchNorm1d(4).double()(joined).detach()
    torch.testing.assert_close(torch.cat([each[1] for each in found[:4]]), expected)
    assert {each[0] for each in found[:4]} == {(0, 1, 2, 3)} and all(each[2] for each in found[:4])


@pytest.mark.parametrize(
    ("partitions", "closures"),
    [
        pytest.param([[[0, 1], [2, 3]], [[1, 2], [0], [3]]], [(0, 1, 2, 3)] * 4, id="a line"),
        pytest.param([[[0, 1], [2, 3]], [[0, 1], [2, 3]]], [(0, 1)] * 2 + [(2, 3)] * 2, id="the same twice"),
        pytest.param([[[0, 1], [2], [3]], [[0], [1], [2, 3]]], [(0, 1)] * 2 + [(2, 3)] * 2, id="apart"),
        pytest.param([[[0], [1], [2], [3]], [[0], [1], [2], [3]]], [(0,), (1,), (2,), (3,)], id="alone"),
        pytest.param([[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0, 3], [1], [2]]], [(0, 1, 2, 3)] * 4, id="three"),
    ],
)
def test_what_chained_groups_connect(partitions: list[list[list[int]]], closures: list[tuple[int, ...]]) -> None:
    """Twice, so that the second conversion does not meet what the first has left in the store."""

    def run(rank: int) -> list[tuple[int, ...]]:
        found = []
        for _ in range(2):
            chain = Chain(*(AllReduce(process_group=group) for group in groups_of(rank, *partitions)))
            layer = norm(Periodic(every=2, policy=chain))
            distnorm.attach(layer)
            found.append(layer._site.conversion.bound().topology.ranks)
        return found

    assert run_threads(4, run) == [[each] * 2 for each in closures]


def test_a_chain_with_a_part_for_all_concerns_all() -> None:
    def run(rank: int) -> tuple[tuple[int, ...], bool]:
        (pair,) = groups_of(rank, [[0, 1], [2, 3]])
        chain = Chain(AllReduce(process_group=pair), AllReduce(axis="node"))
        layer = norm(chain, mesh=nodes_by_local(4))
        distnorm.attach(layer)
        binding = layer._site.conversion.bound()
        return binding.topology.ranks, binding.agrees

    assert run_threads(4, run) == [((0, 1, 2, 3), True)] * 4


def test_a_given_group_still_wins() -> None:
    """``attach(process_group=...)`` names the ranks, whatever the parts' groups connect."""

    def run(rank: int) -> tuple[int, ...]:
        rows, pair = groups_of(rank, [[0], [1], [2], [3]], [[0, 1], [2, 3]])
        policy = Chain(AllReduce(process_group=rows), AllReduce(process_group=pair))
        layer = norm(policy)
        distnorm.attach(layer, process_group=dist.group.WORLD)
        return layer._site.conversion.bound().topology.ranks

    assert run_threads(4, run) == [(0, 1, 2, 3)] * 4


def test_groups_that_do_not_match_are_named_on_every_rank() -> None:
    """Rank 1 was given another group than rank 0 thinks."""

    def run(rank: int) -> None:
        pair, single = dist.new_group([0, 1]), dist.new_group([1])
        policy = AllReduce(process_group=single if rank == 1 else pair)
        layer = norm(policy)
        distnorm.attach(layer, process_group=pair)

    for outcome in run_threads_all(2, run, timeout=10.0):
        assert isinstance(outcome, RuntimeError), outcome
        assert "rank 0 shares statistics in a process group of ranks [0, 1], but rank 1" in str(outcome)


def test_a_warm_up_within_groups() -> None:
    """Explicit groups of the first policy bound the second one, too, and windows are the groups' own."""

    def run(rank: int) -> list[Tensor]:
        (pair,) = groups_of(rank, [[0, 1], [2, 3]])
        policy = Warmup(first=AllReduce(process_group=pair), then=Moving(window=3), steps=3)
        layer = norm(policy, RMS())
        for step in range(5):
            layer(batch(step, rank % 2).requires_grad_()).square().sum().backward()
        return [layer.running_var.clone(), *distnorm.state_dict(layer)[0]["reducer"]["then"]["window"].values()]

    found = run_threads(4, run)
    for each in found[1:]:
        same(each, found[0])


def test_copies_of_chained_groups_lose_them() -> None:
    def run(rank: int) -> list[str]:
        rows, columns = groups_of(rank, [[0, 1]], [[0], [1]])
        policy = Chain(AllReduce(process_group=rows), AllReduce(process_group=columns))
        layer = norm(policy)
        distnorm.attach(copy.deepcopy(layer))
        with pytest.raises(RuntimeError, match=r"its process group over ranks \[0, 1\] cannot be pickled") as caught:
            distnorm.attach(pickle.loads(pickle.dumps(layer)))
        return [str(caught.value)]

    run_threads(2, run)
