"""FSDP2: sharded parameters, bfloat16 parameters, checkpoints, meshes, and scripts that stay as they are.

The reference of exact recipes is stock batch norm in one process that holds the joined batch; of moving ones, the same
model under DistributedDataParallel.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm.integrations.fsdp import wrap_fully_shard
from distnorm.layers.module import DistBatchNorm2d
from distnorm.settings import Settings
from tests.integrations.fsdp_models import LR, MABN, Net, batch, joined, net, shard, train, whole
from tests.support.pool import Pool

EXAMPLES = Path(__file__).parents[2] / "examples"


# Exact recipes ----------------------------------------------------------------------------------------------


def train_exact(rank: int, when: str, parts: str, recompute: bool) -> dict[str, Tensor]:
    model = net(recompute=recompute)
    fuse = parts == "blocks"  # FSDP2 hooks what it shards by itself
    if when == "before":
        distnorm.convert(model, "sync_bn", fuse=fuse)
    shard(model, parts)
    if when == "after":
        distnorm.convert(model, "sync_bn", fuse=fuse)
    assert model.stem[1].epilogue == ("relu" if fuse else "")
    assert isinstance(model.stem[1], DistBatchNorm2d) and isinstance(model.stem[1].weight, DTensor)
    train(model, range(4), 2, rank)
    return whole(model)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("parts", "recompute"), [("blocks", False), ("leaves", False), ("blocks", True)])
def test_sync_bn_equals_stock_on_the_joined_batch(pool: Pool, when: str, parts: str, recompute: bool) -> None:
    expected = joined(4, 2)
    for state in pool.run(2, train_exact, when, parts, recompute):
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-9)


def train_hybrid(rank: int) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    undo = wrap_fully_shard(Settings(recipe="sync_bn"))
    model = shard(net(), mesh=mesh)
    undo()
    train(model, range(4), 4, rank)
    return whole(model)


def test_replicate_and_shard_axes_are_both_data(pool: Pool) -> None:
    expected = joined(4, 4)
    for state in pool.run(4, train_hybrid):
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-9)


def train_one_axis(rank: int) -> dict[str, Tensor]:
    """Ranks of one column see the same data, as tensor parallel ranks do; each row has a model of its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "other"))
    model = distnorm.convert(net(), "sync_bn", mesh=mesh["dp"])
    shard(model, mesh=mesh["dp"])
    place = mesh.get_local_rank("dp")
    train(model, range(4), 2, place)
    return whole(model)


def test_one_data_axis_of_two(pool: Pool) -> None:
    expected = joined(4, 2)
    for state in pool.run(4, train_one_axis):
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-9)


# Moving recipes ---------------------------------------------------------------------------------------------


def train_moving(rank: int, engine: str, attached: bool) -> tuple[dict[str, Tensor], list[int]]:
    """The trained state with centred weights written out, and the collectives of the last steps."""
    model = distnorm.convert(net(), "mabn", **MABN)
    wrapped = shard(model, "leaves") if engine == "fsdp" else DistributedDataParallel(model)
    with distnorm.Ledger(model) as ledger:
        train(wrapped, range(10), 2, rank, attached=attached)
    return whole(distnorm.revert(model)), [ledger.steps[step].collectives for step in range(5, 10)]


@pytest.mark.parametrize("attached", [False, True])
def test_mabn_equals_the_same_model_under_ddp(pool: Pool, attached: bool) -> None:
    expected = pool.run(2, train_moving, "ddp", False)[0][0]
    for state, collectives in pool.run(2, train_moving, "fsdp", attached):
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-9)
        assert collectives == [1] * 5


def accumulate(rank: int, engine: str) -> dict[str, Tensor]:
    """Two backward passes per optimizer step, gradients reduced in the second."""
    model = distnorm.convert(net(), "mabn", **MABN)
    wrapped = shard(model) if engine == "fsdp" else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), LR)
    distnorm.attach(model, optimizer=optimizer)
    for step in range(8):
        for part in (0, 1):
            x_NCS, labels_N = (each[2 * rank + part :: 4] for each in batch(step, 2))
            if engine == "fsdp":
                wrapped.set_requires_gradient_sync(part == 1)
            else:
                wrapped.require_backward_grad_sync = part == 1
            F.cross_entropy(wrapped(x_NCS), labels_N).backward()
        optimizer.step()
        optimizer.zero_grad()
    return whole(distnorm.revert(model))


def test_mabn_with_gradient_accumulation(pool: Pool) -> None:
    expected = pool.run(2, accumulate, "ddp")[0]
    for state in pool.run(2, accumulate, "fsdp"):
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-9)


def project(rank: int, dim: int, form: str) -> tuple[Tensor, Tensor, int]:
    """The centred weight, what it should be, and the collectives of centring it."""
    model = distnorm.convert(nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)).double(), "mabn")
    before = model[0].weight.detach().clone()
    dist.broadcast(before, 0)
    model[0].weight.data.copy_(before)
    fsdp.fully_shard(model, shard_placement_fn=lambda p: Shard(dim) if p.dim() == 4 else None)
    with CommDebugMode() as communication:
        getattr(model[0], form)()
    collectives = communication.get_total_counts()
    return whole(model)["0.weight"], before - before.mean((1, 2, 3), keepdim=True), collectives


@pytest.mark.parametrize(("dim", "form"), [(0, "project"), (1, "project")])
def test_centring_sharded_weights(pool: Pool, dim: int, form: str) -> None:
    """Filters lie whole on a rank unless the user shards another dimension."""
    for weight, expected, collectives in pool.run(2, project, dim, form):
        torch.testing.assert_close(weight, expected, rtol=1e-12, atol=1e-12)
        assert (collectives == 0) == (dim == 0)


# bfloat16 parameters ----------------------------------------------------------------------------------------


def train_bfloat16(rank: int, recipe: str) -> list[tuple[Tensor, ...]]:
    """Per layer: running mean and variance after one step, and the layer's inputs."""
    model = distnorm.convert(net(torch.float32), recipe)
    shard(model, mp_policy=fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    layers = [model.stem[1], model.block[1]]
    seen: list[Tensor] = []
    for layer in layers:
        layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0].detach().clone()))
    train(model, [0], 2, rank)
    running = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in layers]
    train(model, range(1, 6), 2, rank)
    assert model.eval()(batch(9, 2, torch.float32)[0]).dtype == torch.bfloat16
    assert all(layer.running_var.dtype == torch.float32 for layer in layers)
    return [(*each, x_NCS) for each, x_NCS in zip(running, seen, strict=False)]


def test_statistics_stay_float32(pool: Pool) -> None:
    """bfloat16 statistics would be off by 4e-3."""
    ranks = pool.run(2, train_bfloat16, "sync_bn")
    for layer in (0, 1):
        assert all(rank[layer][2].dtype == torch.bfloat16 for rank in ranks)
        x_CS = torch.cat([rank[layer][2].double() for rank in ranks]).transpose(0, 1).flatten(1)
        for mean_C, var_C, _ in (rank[layer] for rank in ranks):
            assert mean_C.dtype == var_C.dtype == torch.float32
            torch.testing.assert_close(mean_C.double(), 0.1 * x_CS.mean(1), rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(var_C.double(), 0.9 + 0.1 * x_CS.var(1), rtol=1e-6, atol=1e-7)


def test_mabn_in_bfloat16(pool: Pool) -> None:
    """The first step is synchronous; RMS tracks x^2 about 0."""
    ranks = pool.run(2, train_bfloat16, "mabn")
    x_CS = torch.cat([rank[0][2].double() for rank in ranks]).transpose(0, 1).flatten(1)
    for rank in ranks:
        torch.testing.assert_close(rank[0][1].double(), 0.98 + 0.02 * x_CS.square().mean(1), rtol=1e-6, atol=1e-7)


# State ------------------------------------------------------------------------------------------------------


def exchange_states(rank: int, recipe: str) -> None:
    """Out to a stock model and back into a sharded one, strictly."""
    model = shard(distnorm.convert(net(), recipe))
    train(model, range(3), 2, rank)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    parts = [state]
    dist.broadcast_object_list(parts, src=0)
    state = parts[0]
    stock = net()
    stock.load_state_dict(state, strict=True)
    assert list(state) == list(stock.state_dict())
    other = shard(distnorm.convert(net(), recipe))
    options = StateDictOptions(full_state_dict=True, strict=True)
    set_model_state_dict(other, state, options=options)
    torch.testing.assert_close(whole(other), dict(stock.state_dict()), rtol=0, atol=0)
    x_NCS = batch(9, 2)[0]
    y = model.eval()(x_NCS)
    torch.testing.assert_close(other.eval()(x_NCS), y, rtol=0, atol=0)
    if recipe == "sync_bn":
        torch.testing.assert_close(stock.eval()(x_NCS), y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recipe", ["sync_bn", "mabn"])
def test_states_are_those_of_the_stock_model(pool: Pool, recipe: str) -> None:
    pool.run(2, exchange_states, recipe)


def resume(rank: int, folder: str) -> None:
    """torch.distributed.checkpoint for model and optimizer, one file per rank for windows: bit for bit."""

    def start() -> tuple[Net, torch.optim.Optimizer]:
        model = shard(distnorm.convert(net(), "mabn", **MABN))
        optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
        distnorm.attach(model, optimizer=optimizer)
        return model, optimizer

    model, optimizer = start()
    train(model, range(5), 2, rank, optimizer=optimizer)
    state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)
    torch.save(distnorm.state_dict(model), f"{folder}/distnorm_{rank}.pt")
    losses = train(model, range(5, 9), 2, rank, optimizer=optimizer)

    other, other_optimizer = start()
    state, optimizer_state = get_state_dict(other, other_optimizer)
    dcp.load({"model": state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(other, other_optimizer, model_state_dict=state, optim_state_dict=optimizer_state)
    distnorm.load_state_dict(other, torch.load(f"{folder}/distnorm_{rank}.pt"))
    assert train(other, range(5, 9), 2, rank, optimizer=other_optimizer) == losses
    torch.testing.assert_close(whole(other), whole(model), rtol=0, atol=0)


def test_resuming_from_a_sharded_checkpoint(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, resume, str(tmp_path))


@pytest.mark.slow
def test_the_example_trains_as_one_process_with_stock_batch_norm() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = str(EXAMPLES / "fsdp2.py")
    job = subprocess.run([*command, script], capture_output=True, text=True, env=environment, check=False)
    assert job.returncode == 0, job.stderr
    found = json.loads(job.stdout.split("RESULT", 1)[1])
    assert found["world_size"] == 2

    task = runpy.run_path(str(EXAMPLES / "task.py"))
    model = task["build_model"]()
    optimizer = torch.optim.SGD(model.parameters(), lr=task["LEARNING_RATE"])
    losses = []
    for images, labels in task["train_loader"]():
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(losses[:20]), rtol=0, atol=1e-5)
    variances = [each.running_var.sum().item() for each in model.modules() if isinstance(each, nn.BatchNorm2d)]
    torch.testing.assert_close(torch.tensor(found["running_var"]), torch.tensor(variances), rtol=1e-4, atol=0)
