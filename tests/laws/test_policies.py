"""Laws 2, 3, 5, 8 and 9: what policies promise, whatever method they carry."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import distnorm
from distnorm import Recipe
from distnorm.layers.layout import measure
from distnorm.policies import AllReduce, Local, Periodic, Policy
from distnorm.types import Layout, Slot
from tests.laws.ranks import answer_on_rank, bind, make_layer, nodes_by_local, random_case
from tests.support.fake import fake_world
from tests.support.threads import run_threads
from tests.zoo import EXACT, METHODS, MOVING, POLICIES, methods, pairs

WORLDS = st.sampled_from([2, 3, 4])


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@given(world_size=WORLDS, seed=st.integers(0, 2**16), step=st.integers(0, 5))
def test_law_2_policies_are_self_adjoint(policy: Policy, world_size: int, seed: int, step: int):
    """Sum over ranks of <reduce(u), v> = <u, reduce(v)>: gradients through a policy are its own reductions."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.randn(world_size, 5, generator=generator, dtype=torch.float64) for _ in range(2))

    def products(rank: int) -> tuple[Tensor, Tensor]:
        reducer = bind(policy, world_size, Layout({}, torch.device("cpu")))
        there = reducer.reduce(u[rank], Slot("layer", "forward", step)) @ v[rank]
        back = u[rank] @ reducer.reduce(v[rank], Slot("layer", "backward", step))
        return there, back

    there, back = (torch.stack(each).sum() for each in zip(*run_threads(world_size, products), strict=True))
    torch.testing.assert_close(there, back, rtol=1e-12, atol=1e-12)


def _train(model: nn.Module, x: Tensor, steps: int) -> None:
    for _ in range(steps):
        model(x).square().sum().backward()


def _small_model(recipe: Recipe, world_size: int, *, layers: int = 3) -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(layers)]
    generator = torch.Generator().manual_seed(0)  # the global one is common to all threaded ranks
    for block in blocks:
        for parameter in block[0].parameters():
            nn.init.normal_(parameter, generator=generator)
    return distnorm.convert(nn.Sequential(*blocks), recipe, mesh=nodes_by_local(world_size))


@pytest.mark.parametrize(("under_test", "policy"), pairs(POLICIES))
def test_law_3_collective_budget(policy, under_test):
    """Exactly ``policy.facts.collectives`` per share and direction; a group of one rank needs none."""
    steps, layers = 6, 3
    recipe = Recipe(method=under_test.method, policy=policy)

    def count(rank: int) -> tuple[int, dict[str, int]]:
        model = _small_model(recipe, 4, layers=layers)
        with distnorm.Ledger(model) as ledger:
            _train(model, torch.randn(4, 4, generator=torch.Generator().manual_seed(rank)), steps)
        return ledger.collectives, {name: tally.collectives for name, tally in ledger.layers.items()}

    shares = len(measure(under_test.method, 4).parts)
    per_share = 0 if policy == AllReduce(group_size=1) else policy.facts.collectives * shares
    for collectives, by_layer in run_threads(4, count):
        assert collectives == per_share * 2 * layers * steps
        assert set(by_layer.values()) <= {per_share * 2 * steps}


@pytest.mark.parametrize(("name", "options"), [("sync_bn", {}), ("group_bn", {"size": 8}), ("local_bn", {})])
def test_law_3_at_64_ranks(name, options):
    with fake_world(64):
        recipe = distnorm.recipes.build(name, **options)
        model = _small_model(recipe, 64)
        with distnorm.Ledger(model) as ledger:
            _train(model, torch.randn(4, 4), 2)
        assert ledger.collectives == recipe.policy.facts.collectives * 2 * 3 * 2
        assert dist.get_world_size() == 64


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("under_test", "policy"), pairs(POLICIES | MOVING))
def test_law_5_recomputation_changes_nothing(under_test, policy, reentrant):
    """Same gradients, running statistics and collectives with activation checkpointing as without, for two steps."""
    recipe = Recipe(method=under_test.method, policy=policy)

    def run(rank: int, checkpointed: bool) -> tuple[list[Tensor], int]:
        model = _small_model(recipe, 4)
        x = torch.randn(4, 4, generator=torch.Generator().manual_seed(rank)).requires_grad_()
        with distnorm.Ledger(model) as ledger:
            for _ in range(2):
                y = x
                for block in model:
                    # The same block twice in one segment: recomputation must not mix the two calls up.
                    twice = lambda value, block=block: block(block(value) * 1.5)  # noqa: E731
                    y = checkpoint(twice, y, use_reentrant=reentrant) if checkpointed else twice(y)
                y.square().sum().backward()
        return [*(parameter.grad for parameter in model.parameters()), *model.buffers()], ledger.collectives

    plain, checked = run_threads(4, run, False), run_threads(4, run, True)
    for (expected, collectives), (found, recounted) in zip(plain, checked, strict=True):
        assert recounted == collectives
        for one, other in zip(expected, found, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(("under_test", "policy"), pairs(POLICIES, usual=()))
@given(seed=st.integers(0, 2**16))
def test_law_8_running_statistics_agree_bit_for_bit(under_test, policy, seed):
    """On all ranks at all times where the policy says so, and everywhere after ``sync_running_stats``."""
    recipe = Recipe(method=under_test.method, policy=policy)

    def run(rank: int) -> tuple[list[list[Tensor]], list[Tensor], bool]:
        model = _small_model(recipe, 4)
        generator = torch.Generator().manual_seed(seed + rank)
        history = []
        for step in range(4):
            _train(model, torch.randn(2 + (rank + step) % 3, 4, generator=generator), 1)
            history.append([buffer.clone() for buffer in model.buffers()])
        agrees = model[0][1]._site.conversion.bound().agrees
        distnorm.sync_running_stats(model)
        return history, list(model.buffers()), agrees

    results = run_threads(4, run)
    for history, united, agrees in results:
        assert agrees or policy not in EXACT.values()
        if agrees:
            torch.testing.assert_close(history, results[0][0], rtol=0, atol=0)
        torch.testing.assert_close(united, results[0][1], rtol=0, atol=0)


@pytest.mark.parametrize(("under_test", "policy"), pairs(POLICIES | MOVING))
def test_tails_change_no_values(policy, under_test):
    """A norm that adds a shortcut and applies a ReLU itself, beside one that does not, for three steps."""
    recipe = Recipe(method=under_test.method, policy=policy)

    def run(rank: int, fused: bool) -> list[Tensor]:
        layer = make_layer(recipe, random_case((0, 0, 0, 0), (), mean=0.0, seed=0), 4)
        generator = torch.Generator().manual_seed(rank)
        found = []
        for _ in range(3):
            x, shortcut, dy = torch.randn(3, 2 + rank, 3, 5, generator=generator, dtype=torch.float64).unbind()
            x, shortcut = x.requires_grad_(), shortcut.requires_grad_()
            y = layer(x, residual=shortcut, relu=True) if fused else torch.relu(layer(x) + shortcut)
            y.backward(dy)
            found += [y.detach(), x.grad, shortcut.grad]
        return [*found, layer.weight.grad, layer.bias.grad, *layer.buffers()]

    torch.testing.assert_close(run_threads(4, run, True), run_threads(4, run, False), rtol=1e-10, atol=1e-10)


REDUCTIONS = [
    pytest.param(Periodic(every=1), AllReduce(), id="every step"),
    pytest.param(AllReduce(group_size=4), AllReduce(), id="one block"),
    pytest.param(AllReduce(group_size=1), Local(), id="blocks of one"),
    pytest.param(EXACT["Chain"], AllReduce(), id="two hops"),
]


@pytest.mark.parametrize("under_test", methods())
@pytest.mark.parametrize(("policy", "equivalent"), REDUCTIONS)
@given(seed=st.integers(0, 2**16))
def test_law_9_named_reductions(policy, equivalent, under_test, seed):
    case = random_case((2, 3, 1, 4), (3,), mean=1.0, seed=seed)
    one, other = (
        run_threads(4, answer_on_rank, case, Recipe(method=under_test.method, policy=each))
        for each in (policy, equivalent)
    )
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_periodic_normalizes_locally_in_between():
    """Step 0 is the joined batch's, steps 1 and 2 each rank's own, step 3 joined again."""
    case = random_case((3, 3), (2,), mean=1.0, seed=0)

    def run(rank: int, policy: Policy) -> list[Tensor]:
        layer = make_layer(Recipe(method=METHODS["BatchNorm"].method, policy=policy), case, 2)
        outputs = []
        for _ in range(4):
            y = layer(case.inputs[rank].clone().requires_grad_())
            y.sum().backward()
            outputs.append(y.detach())
        return outputs

    periodic, joined, local = (run_threads(2, run, each) for each in (Periodic(every=3), AllReduce(), Local()))
    for rank in range(2):
        for step, expected in enumerate((joined, local, local, joined)):
            torch.testing.assert_close(periodic[rank][step], expected[rank][step])
        assert not torch.allclose(joined[rank][0], local[rank][0])
