"""A SyncBatchNorm's own process group bounds the ranks that its layer shares with, whatever the recipe."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm import Recipe
from distnorm.attach import conversions_of
from distnorm.methods import BatchNorm
from distnorm.nn import SyncBatchNorm
from distnorm.policies import AllReduce
from tests.distributed.jobs import without_wrapper_warnings
from tests.moving.models import same
from tests.support.pool import Pool
from tests.support.threads import run_threads

PAIRS = [[0, 1], [2, 3]]


def own(rank: int, partition: list[list[int]]) -> dist.ProcessGroup:
    """The group of ``partition`` that this rank is in."""
    made = [(ranks, dist.new_group(ranks)) for ranks in partition]
    return next(group for ranks, group in made if rank in ranks)


def batch(rank: int, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randn(3 + rank, 4, generator=generator, dtype=torch.float64) * (1 + rank) + rank


def layer(group: dist.ProcessGroup | None) -> nn.SyncBatchNorm:
    return nn.SyncBatchNorm(4, process_group=group).double()


def stock(ranks: list[int], step: int = 0) -> list[Tensor]:
    """What the joined batch of ``ranks`` comes to, rank by rank, by torch's own layer in one process."""
    joined = nn.BatchNorm1d(4).double()(torch.cat([batch(rank, step) for rank in ranks]))
    return list(joined.detach().split([len(batch(rank)) for rank in ranks]))


@pytest.mark.parametrize("partition", [PAIRS, [[0], [1], [2], [3]], [[0, 1, 2, 3]], [[0, 3], [1, 2]]], ids=str)
def test_ranks_of_different_groups_do_not_share(partition: list[list[int]]) -> None:
    def run(rank: int) -> Tensor:
        converted = distnorm.convert(layer(own(rank, partition)), "sync_bn")
        return converted(batch(rank).requires_grad_()).detach()

    found = run_threads(4, run)
    for ranks in partition:
        for rank, expected in zip(ranks, stock(ranks), strict=True):
            torch.testing.assert_close(found[rank], expected)


class Mixed(nn.Module):
    """Three groups in one model: all ranks, pairs, and each alone."""

    def __init__(self, pair: dist.ProcessGroup, single: dist.ProcessGroup) -> None:
        super().__init__()
        self.everyone = nn.BatchNorm1d(4)
        self.mix = nn.Linear(4, 4)
        self.pair = nn.SyncBatchNorm(4, process_group=pair)
        self.single = nn.SyncBatchNorm(4, process_group=single)
        self.again = nn.SyncBatchNorm(4, process_group=pair)

    def forward(self, x_NC: Tensor) -> Tensor:
        return self.again(self.single(self.pair(self.mix(self.everyone(x_NC)))))


def mixed(rank: int) -> Mixed:
    model = Mixed(own(rank, PAIRS), own(rank, [[0], [1], [2], [3]])).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.2)
    return model


def test_several_groups_in_one_model() -> None:
    """One conversion each, which attach, state_dict, Ledger, stats and end_step know."""

    def run(rank: int) -> tuple[list[tuple[int, ...]], int, list[int], list[Tensor]]:
        model = distnorm.convert(mixed(rank), "mabn", window=2, warmup=2, weights="none")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        distnorm.attach(model, optimizer=optimizer)
        with distnorm.Ledger(model) as ledger:
            for step in range(4):
                model(batch(rank, step).requires_grad_()).square().sum().backward()
                optimizer.step()
        assert set(distnorm.stats(model, exact=True)) >= {f"{name}/entries" for name in ("everyone", "pair", "single")}
        state = distnorm.state_dict(model)
        distnorm.load_state_dict(model, state)
        distnorm.end_step(model)
        bound = [each.bound() for each in conversions_of(model)]
        distnorm.sync_running_stats(model)
        seen = [model.pair.running_var, model.everyone.running_var]
        return [each.topology.ranks for each in bound], ledger.collectives, [each.step for each in bound], seen

    found = run_threads(4, run)
    for rank, (ranks, collectives, steps, seen) in enumerate(found):
        assert ranks == [(0, 1, 2, 3), tuple(PAIRS[rank // 2]), (rank,)]
        assert collectives == 2 * 3 * 2 + 2 * 2  # three layers share in two exact steps, two conversions later on
        assert steps == [5, 5, 5]
        same(seen[1], found[0][3][1])
        same(seen[0], found[rank ^ 1][3][0])
    assert not torch.equal(found[0][3][0], found[2][3][0])


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("group_bn", {"size": 2}), ("hierarchical_bn", {}), ("periodic_bn", {"every": 2}), ("lazy_bn", {"warmup": 1})],
)
def test_every_recipe_works_within_the_group(recipe: str, options: dict[str, Any]) -> None:
    def run(rank: int) -> Tensor:
        converted = distnorm.convert(layer(own(rank, PAIRS)), recipe, **options)
        for step in range(3):
            y = converted(batch(rank, step).requires_grad_())
            y.sum().backward()
            if step == 0:
                first = y.detach()
        assert converted.recipe == distnorm.recipes.build(recipe, **options)
        return first

    found = run_threads(4, run)
    for ranks in PAIRS:
        for rank, expected in zip(ranks, stock(ranks), strict=True):
            torch.testing.assert_close(found[rank], expected)


def test_converting_and_taking_it_back() -> None:
    """An equal recipe is no news, and ``revert`` gives every group back."""

    def run(rank: int) -> None:
        model = mixed(rank)
        pair, single = model.pair.process_group, model.single.process_group
        distnorm.convert(model, "sync_bn")
        before = conversions_of(model)
        assert conversions_of(distnorm.convert(model, "sync_bn")) == before and len(before) == 3
        assert {each.recipe for each in (model.everyone, model.pair, model.single)} == {distnorm.recipes.sync_bn()}
        assert model.pair.process_group is pair and model.again.process_group is pair
        with pytest.raises(ValueError, match=r"distnorm.revert\(model\) first"):
            distnorm.convert(model, "local_bn")
        distnorm.revert(model)
        assert [type(each) for each in (model.pair, model.single)] == [nn.SyncBatchNorm] * 2
        assert model.pair.process_group is pair and model.single.process_group is single

    run_threads(4, run)


def test_two_groups_of_the_same_ranks_are_one_conversion() -> None:
    def run(rank: int) -> None:
        one, other = own(rank, PAIRS), own(rank, PAIRS)
        model = nn.Sequential(layer(one), layer(other), layer(dist.group.WORLD), layer(None))
        distnorm.convert(model, "sync_bn")
        assert len(conversions_of(model)) == 2
        assert model[2].process_group is None and model[2]._site.conversion is model[3]._site.conversion
        distnorm.revert(model)
        assert [each.process_group for each in model] == [one, other, dist.group.WORLD, None]

    run_threads(4, run)


def test_overlap_and_centralized_weights_see_the_whole_model() -> None:
    """Feeders and followers are looked for once, not once per group."""

    def run(rank: int) -> list[str]:
        norms = [nn.SyncBatchNorm(4, process_group=group) for group in (own(rank, PAIRS), None)]
        model = nn.Sequential(nn.Conv2d(4, 4, 3), norms[0], nn.Conv2d(4, 4, 3), norms[1], nn.Conv2d(4, 4, 3))
        recipe = Recipe(method=BatchNorm(), policy=AllReduce(), weights="centralized", overlap=True)
        distnorm.convert(model, recipe)
        return [type(each).__name__ for each in model]

    def expected() -> list[str]:
        convs = [nn.Conv2d(4, 4, 3) for _ in range(3)]
        model = nn.Sequential(convs[0], nn.BatchNorm2d(4), convs[1], nn.BatchNorm2d(4), convs[2])
        recipe = Recipe(method=BatchNorm(), policy=AllReduce(), weights="centralized", overlap=True)
        return [type(each).__name__ for each in distnorm.convert(model, recipe)]

    assert run_threads(4, run) == [[name.replace("BatchNorm2d", "SyncBatchNorm") for name in expected()]] * 4


# --- refusals ------------------------------------------------------------------------------------


def test_another_group_than_the_recipes_or_the_meshs_is_refused() -> None:
    def run(rank: int) -> None:
        pair, across = own(rank, PAIRS), own(rank, [[0, 2], [1, 3]])
        mine = PAIRS[rank // 2]
        named = Recipe(method=BatchNorm(), policy=AllReduce(process_group=across))
        model = nn.Sequential(nn.BatchNorm1d(4), layer(pair)).double()
        before = [type(each) for each in model]
        with pytest.raises(
            ValueError, match=rf"^1: the layer's process_group .* \[{mine[0]}, {mine[1]}\], but the recipe .* ranks"
        ):
            distnorm.convert(model, named)
        mesh = dist.device_mesh.DeviceMesh(
            "cpu", torch.tensor([[0, 2], [1, 3]]), mesh_dim_names=("pp", "dp"), _init_backend=False
        )
        with pytest.raises(ValueError, match=r"^1: the layer's process_group .* the mesh .* has ranks"):
            distnorm.convert(model, "sync_bn", mesh=mesh)
        assert [type(each) for each in model] == before and model[1].process_group is pair
        same_ranks = Recipe(method=BatchNorm(), policy=AllReduce(process_group=own(rank, PAIRS)))
        distnorm.convert(model, same_ranks)
        torch.testing.assert_close(model[1](batch(rank).requires_grad_()).detach(), stock(mine)[rank % 2])

    run_threads(4, run)


def test_a_group_without_this_rank_is_refused_by_name(pool: Pool) -> None:
    outcomes = pool.run_all(2, convert_a_stranger)
    assert outcomes[0] == 1
    assert isinstance(outcomes[1], ValueError)
    assert "norm: SyncBatchNorm(process_group=" in str(outcomes[1]) and "Every rank must pass" in str(outcomes[1])


def convert_a_stranger(rank: int) -> int:
    model = nn.ModuleDict({"norm": layer(dist.new_group([0]))})
    return len(conversions_of(distnorm.convert(model, "sync_bn")))


# --- torch's ways --------------------------------------------------------------------------------


def test_our_convert_sync_batchnorm_has_torchs_meaning() -> None:
    """The group that is passed is every layer's, and none means all ranks."""

    def run(rank: int) -> tuple[Tensor, Tensor]:
        pair, single = own(rank, PAIRS), own(rank, [[0], [1], [2], [3]])
        model = nn.Sequential(nn.BatchNorm1d(4), layer(single)).double()
        SyncBatchNorm.convert_sync_batchnorm(model, pair)
        assert model[0].process_group is model[1].process_group is pair
        in_pairs = model[1](batch(rank).requires_grad_()).detach()
        distnorm.revert(model)
        assert type(model[0]) is nn.BatchNorm1d and model[1].process_group is single
        SyncBatchNorm.convert_sync_batchnorm(model)
        assert model[1].process_group is None
        return in_pairs, model[1](batch(rank).requires_grad_()).detach()

    found = run_threads(4, run)
    torch.testing.assert_close([each[0] for each in found], [*stock(PAIRS[0]), *stock(PAIRS[1])])
    torch.testing.assert_close([each[1] for each in found], stock([0, 1, 2, 3]))


def test_attach_with_the_data_parallel_ranks_keeps_a_layers_own_group() -> None:
    def run(rank: int) -> list[tuple[int, ...]]:
        model = distnorm.convert(nn.Sequential(nn.BatchNorm1d(4), layer(own(rank, [[0], [1], [2], [3]]))), "sync_bn")
        distnorm.attach(model, process_group=own(rank, PAIRS))
        return [each.bound().topology.ranks for each in conversions_of(model)]

    assert run_threads(4, run) == [[tuple(PAIRS[rank // 2]), (rank,)] for rank in range(4)]


def test_real_ranks_train_as_torchs_layer_would(pool: Pool) -> None:
    """Gradients and running statistics of pairs, under DistributedDataParallel, from torch's own batch norm."""
    found = pool.run(4, train_in_pairs)
    for rank, (ours, theirs) in enumerate(found):
        torch.testing.assert_close(ours, theirs, msg=f"rank {rank}")


def train_in_pairs(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    group = own(rank, PAIRS)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4, process_group=group)).double()
    reference = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm1d(4).double())
    with without_wrapper_warnings():
        wrapped = DistributedDataParallel(distnorm.convert(model, "sync_bn"), broadcast_buffers=False)
    wrapped(batch(rank)).square().sum().backward()
    for pair in PAIRS:  # each pair's joined batch by itself; DDP averages over all ranks
        norm = nn.BatchNorm1d(4).double()
        norm.weight, norm.bias = reference[1].weight, reference[1].bias
        norm(reference[0](torch.cat([batch(each) for each in pair]))).square().sum().backward()
        if rank in pair:
            running = [norm.running_mean, norm.running_var]
    theirs = [parameter.grad / 4 for parameter in reference.parameters()]
    ours = [parameter.grad for parameter in model.parameters()]
    return [*ours, model[1].running_mean, model[1].running_var], [*theirs, *running]
