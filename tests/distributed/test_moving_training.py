"""Moving statistics under DistributedDataParallel: what is shared is equal on all ranks, bit for bit."""

from __future__ import annotations

import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

import distnorm
from tests.distributed import moving_jobs as moving
from tests.distributed.moving_jobs import LAYERS, RECIPES, WARM, WINDOW, C, Seen
from tests.support.pool import Pool

STEPS = 200


def agree(recipe: str, world_size: int, ranks: list[Seen]) -> None:
    """All that is shared is equal on those that share it."""
    if recipe == "hierarchical_mabn" and world_size == 4:
        moving.equal_on_all_ranks(ranks[::2])
        moving.equal_on_all_ranks(ranks[1::2])
        for each in ranks[1:]:  # cotangents are added up in the node after they have travelled
            moving.equal((each.parameters, each.running), (ranks[0].parameters, ranks[0].running))
            moving.equal(each.window["ring"][:, moving.RMS_FORWARD], ranks[0].window["ring"][:, moving.RMS_FORWARD])
    else:
        moving.equal_on_all_ranks(ranks)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_long_training(pool: Pool, recipe: str, world_size: int) -> None:
    ranks = pool.run(world_size, train, recipe, STEPS, env=moving.nodes(world_size))
    agree(recipe, world_size, ranks)
    blocking = 2 * len(LAYERS)
    steady = 1 + (blocking if recipe == "hierarchical_mabn" and world_size == 4 else 0)
    for each in ranks:
        assert each.messages == []
        assert each.state["step"] == STEPS
        assert each.collectives == {step: blocking if step < WARM else steady for step in range(STEPS)}
        assert sum(each.losses[-20:]) < 0.9 * sum(each.losses[:20])
        for layer in LAYERS:  # completed steps, and those of the warm-up
            assert each.running[f"{layer}.num_batches_tracked"] == STEPS - 1
        if recipe != "lazy_bn":
            moving.equal(each.window["filled"], torch.full((4,), WINDOW - 1))


def train(rank: int, recipe: str, steps: int) -> Seen:
    return moving.train(rank, moving.wrapped(moving.net(recipe)), range(steps))


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_some_ranks_skip_a_layer(pool: Pool, recipe: str, world_size: int) -> None:
    ranks = pool.run(world_size, train_with_skips, recipe, world_size, 40, env=moving.nodes(world_size))
    agree(recipe, world_size, ranks)
    always = pool.run(world_size, train, recipe, 40, env=moving.nodes(world_size))
    assert not torch.equal(always[0].running["norm2.running_var"], ranks[0].running["norm2.running_var"])
    for each in ranks:
        assert each.messages == []
        assert each.running["norm2.num_batches_tracked"] == 39 - skipped_by_all(39)
        assert each.running["norm1.num_batches_tracked"] == 39


def skipped_by_all(steps: int) -> int:
    return sum(step > WARM and step % 4 == 3 for step in range(steps))


def train_with_skips(rank: int, recipe: str, world_size: int, steps: int) -> Seen:
    """The second node skips the second norm in odd steps, and all ranks in every fourth."""

    def skip(step: int) -> bool:
        return step > WARM and (step % 4 == 3 or (rank >= world_size // 2 and step % 2 == 1))

    model = moving.wrapped(moving.net(recipe), find_unused_parameters=True)
    return moving.train(rank, model, range(steps), skip=skip)


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_with_compressed_gradients(pool: Pool, recipe: str) -> None:
    ranks = pool.run(2, train_compressed, recipe)
    moving.equal_on_all_ranks(ranks)
    plain = pool.run(2, train, recipe, 30)
    assert not torch.equal(plain[0].parameters["conv2.weight"], ranks[0].parameters["conv2.weight"])


def train_compressed(rank: int, recipe: str) -> Seen:
    model = moving.wrapped(moving.net(recipe, dtype=torch.float32))
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=3)
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return moving.train(rank, model, range(30), dtype=torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_compiled(pool: Pool, recipe: str) -> None:
    steps = 12
    plain = pool.run(2, train, recipe, steps)
    compiled = pool.run(2, train_compiled, recipe, steps, timeout=110.0)
    moving.equal_on_all_ranks(compiled)
    for ours, expected in zip(compiled, plain, strict=True):
        assert ours.extra == 1
        moving.close(ours.parameters, expected.parameters)
        moving.close(ours.running, expected.running)
        moving.close(ours.in_flight, expected.in_flight)
        assert (ours.collectives, ours.messages) == (expected.collectives, [])


def train_compiled(rank: int, recipe: str, steps: int) -> Seen:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = torch.compile(moving.net(recipe), fullgraph=True, backend=counter)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit", category=DeprecationWarning)  # by torch's own compiler
        found = moving.train(rank, moving.wrapped(model), range(steps))
    return found._replace(extra=counter.frame_count)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_checkpointed(pool: Pool, recipe: str, reentrant: bool) -> None:
    plain = pool.run(2, train, recipe, 20)
    checkpointed = pool.run(2, train_checkpointed, recipe, reentrant)
    moving.equal_on_all_ranks(checkpointed)
    for ours, expected in zip(checkpointed, plain, strict=True):
        moving.close(ours.parameters, expected.parameters)
        moving.close(ours.running, expected.running)
        moving.close(ours.in_flight, expected.in_flight)
        assert (ours.collectives, ours.messages) == (expected.collectives, [])


def train_checkpointed(rank: int, recipe: str, reentrant: bool) -> Seen:
    return moving.train(rank, moving.wrapped(moving.net(recipe, reentrant=reentrant)), range(20))


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_frozen_affine(pool: Pool, recipe: str) -> None:
    """Weight and bias that do not learn: statistics and cotangents travel as ever."""
    ranks = pool.run(2, train_frozen, recipe, "affine")
    moving.equal_on_all_ranks(ranks)
    for each in ranks:
        moving.equal(each.parameters["norm2.weight"], torch.ones(C, dtype=torch.float64))
        assert (weights_of(each) > 0).all()
        assert each.running["norm2.num_batches_tracked"] == 19
        assert each.messages == []


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_layer_in_evaluation(pool: Pool, recipe: str) -> None:
    """A layer that evaluates shares nothing and keeps its running statistics; the other one goes on."""
    ranks = pool.run(2, train_frozen, recipe, "eval")
    moving.equal_on_all_ranks(ranks)
    for each in ranks:
        assert each.running["norm2.num_batches_tracked"] == 0
        moving.equal(each.running["norm2.running_var"], torch.ones(C, dtype=torch.float64))
        assert each.running["norm1.num_batches_tracked"] == 19
        assert (weights_of(each) > 0).tolist() == [True, True, False, False]
        assert each.messages == []


def weights_of(each: Seen) -> Tensor:
    return each.in_flight[-5:-1]


def train_frozen(rank: int, recipe: str, how: str) -> Seen:
    model = moving.net(recipe)
    if how == "affine":
        model.norm2.requires_grad_(False)
    else:
        model.norm2.requires_grad_(False).eval()
    return moving.train(rank, moving.wrapped(model), range(20))


def test_frozen_stem(pool: Pool) -> None:
    """Nothing before the first norm learns, so no cotangent reaches it; its statistics move all the same."""
    ranks = pool.run(2, train_frozen_stem)
    moving.equal_on_all_ranks(ranks)
    for each in ranks:
        assert (weights_of(each) > 0).tolist() == [True, False, True, True]
        assert each.running["norm1.num_batches_tracked"] == 19
        assert each.messages == []


def train_frozen_stem(rank: int) -> Seen:
    model = moving.net("mabn")
    model.conv1.requires_grad_(False)
    model.norm1.requires_grad_(False)
    return moving.train(rank, moving.wrapped(model), range(20))


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_stochastic_weight_averaging(pool: Pool, recipe: str) -> None:
    """``update_bn`` gives the running statistics of the joined data, and leaves the trained model's window alone."""
    ranks = pool.run(2, average_weights, recipe)
    joined = [torch.cat([moving.batch(rank, step)[0] for rank in range(2)]) for step in range(100, 104)]
    for running, state, before, after, network in ranks:
        moving.equal((running, state), ranks[0][:2])
        moving.equal(after, before)
        conv1 = {name: state[f"conv1.{name}"] for name in ("weight", "bias")}
        if recipe == "mabn":
            weight = conv1["weight"] - conv1["weight"].mean((1, 2, 3), keepdim=True)
            squares = [F.conv2d(x, weight, conv1["bias"], padding=1).square().mean((0, 2, 3)) for x in joined]
            moving.close(running["norm1.running_var"], torch.stack(squares).mean(0))
            assert not running["norm1.running_mean"].any()
        else:
            stock = moving.Net().double()
            centred = {
                name: value - value.mean((1, 2, 3), keepdim=True) if value.dim() == 4 else value
                for name, value in state.items()
            }
            stock.load_state_dict(centred)
            update_bn(joined, stock)
            moving.close(running, dict(stock.named_buffers()))
        assert network == 4 * len(LAYERS)


def average_weights(rank: int, recipe: str) -> tuple[Any, ...]:
    model = moving.net(recipe)
    wrapped = moving.wrapped(model)
    averaged = AveragedModel(model)
    moving.train(rank, wrapped, range(12), after=lambda step: averaged.update_parameters(model) if step > 8 else None)
    before = deepcopy(distnorm.state_dict(model))
    with distnorm.Ledger(averaged) as ledger:
        update_bn([moving.batch(rank, step)[0] for step in range(100, 104)], averaged)
    state = {name: value.clone() for name, value in averaged.module.state_dict().items()}
    running = {name: value.clone() for name, value in averaged.module.named_buffers()}
    return running, state, before, distnorm.state_dict(model), ledger.collectives


def test_update_bn_of_the_trained_model(pool: Pool) -> None:
    for before, after, tracked in pool.run(2, refresh):
        moving.equal(after, before)
        assert tracked == [4, 4]


def refresh(rank: int) -> tuple[Any, ...]:
    model = moving.net("mabn")
    moving.train(rank, moving.wrapped(model), range(12))
    before = deepcopy(distnorm.state_dict(model))
    update_bn([moving.batch(rank, step)[0] for step in range(100, 104)], model)
    after = distnorm.state_dict(model)
    for state in (*before, *after):
        del state["running"]  # what update_bn is for
    return before, after, [int(getattr(model, name).num_batches_tracked) for name in LAYERS]
