"""Groups that a chain names, among real ranks of which one has no part in it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import distnorm
from distnorm import Recipe
from distnorm.methods import BatchNorm
from distnorm.policies import AllReduce, Chain
from tests.distributed.test_layer_groups import batch, own
from tests.support.pool import Pool


def test_chained_groups_among_real_ranks(pool: Pool) -> None:
    """Pairs in a line, 0-1 and 1-2; rank 3 trains nothing. Every rank's sums, by hand, and united statistics."""
    found = pool.run(4, train_in_a_line)
    assert found[3] is None
    for rank, joined in enumerate([[0, 1], [0, 1, 2], [0, 1, 2]]):
        mean, var, ranks, agrees = found[rank][:4]
        x = torch.cat([batch(each) for each in joined])
        torch.testing.assert_close(mean, x.mean(0))
        torch.testing.assert_close(var, x.var(0))
        assert ranks == (0, 1, 2) and not agrees
    united = torch.stack([found[rank][0] for rank in range(3)]).mean(0)
    for rank in range(3):
        torch.testing.assert_close(found[rank][4], united)


def train_in_a_line(rank: int) -> tuple[Tensor, Tensor, tuple[int, ...], bool, Tensor] | None:
    one, other = own(rank, [[0, 1], [2], [3]]), own(rank, [[0], [1, 2], [3]])
    if rank == 3:
        return None
    policy = Chain(AllReduce(process_group=one), AllReduce(process_group=other))
    norm = nn.BatchNorm1d(4, momentum=1.0).double()
    distnorm.convert(norm, Recipe(method=BatchNorm(), policy=policy))
    norm(batch(rank).requires_grad_()).sum().backward()
    before = norm.running_mean.clone(), norm.running_var.clone()
    distnorm.sync_running_stats(norm)
    binding = norm._site.conversion.bound()
    return *before, binding.topology.ranks, binding.agrees, norm.running_mean
