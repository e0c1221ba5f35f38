"""Device meshes: statistics are shared over the data axis only, whatever the other axis holds.

References are stock batch norm in one process on the joined batch of the data axis, and for moving recipes the same
training as a job of its own without a mesh.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import distnorm
from tests.support.pool import Pool

N = 4
MABN: dict[str, Any] = {"window": 3, "warmup": 3}
NAMES = ("dp", "other")


def net(channels: int = 4) -> nn.Sequential:
    torch.manual_seed(channels)
    first = [nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    second = [nn.Conv2d(channels, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)]
    return nn.Sequential(*first, *second).double()


def batch(step: int, ranks: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x_NCS = torch.randn(ranks * N, 3, 6, 6, generator=generator, dtype=torch.float64)
    x_NCS += torch.arange(ranks).repeat_interleave(N).view(-1, 1, 1, 1)
    return x_NCS, torch.randint(0, 2, (ranks * N,), generator=generator)


def train(model: nn.Module, ranks: int, place: int | None, steps: int = 6) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(steps):
        x_NCS, labels_N = batch(step, ranks)
        if place is not None:
            x_NCS, labels_N = x_NCS[place * N :][:N], labels_N[place * N :][:N]
        F.cross_entropy(model(x_NCS), labels_N).backward()
        optimizer.step()
        optimizer.zero_grad()


def joined(channels: int, ranks: int) -> dict[str, Tensor]:
    model = net(channels)
    train(model, ranks, None)
    return model.state_dict()


def channels_of(holds: str, place: int) -> int:
    """The model at ``place`` of the other axis."""
    return 4 + 2 * place if holds == "different models" else 4


def train_on_mesh(rank: int, data_axis: int, holds: str, recipe: str, options: dict[str, Any]) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=NAMES if data_axis == 0 else NAMES[::-1])
    model = net(channels_of(holds, mesh.get_local_rank("other")))
    distnorm.convert(model, recipe, mesh=mesh["dp"], **options)
    train(DistributedDataParallel(model, process_group=mesh.get_group("dp")), 2, mesh.get_local_rank("dp"))
    return model.state_dict()


def train_alone(rank: int, channels: int, recipe: str, options: dict[str, Any]) -> dict[str, Tensor]:
    model = distnorm.convert(net(channels), recipe, **options)
    train(DistributedDataParallel(model), 2, rank)
    return model.state_dict()


@pytest.mark.parametrize("data_axis", [0, 1])
@pytest.mark.parametrize("holds", ["identical replicas", "different models"])
def test_sync_bn_on_one_axis(pool: Pool, data_axis: int, holds: str) -> None:
    for rank, state in enumerate(pool.run(4, train_on_mesh, data_axis, holds, "sync_bn", {})):
        other = rank % 2 if data_axis == 0 else rank // 2
        expected = joined(channels_of(holds, other), 2)
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("holds", ["identical replicas", "different models"])
def test_mabn_on_one_axis(pool: Pool, holds: str) -> None:
    states = pool.run(4, train_on_mesh, 0, holds, "mabn", MABN)
    for other in (0, 1):
        expected = pool.run(2, train_alone, channels_of(holds, other), "mabn", MABN)
        for state, alone in zip(states[other::2], expected, strict=True):
            torch.testing.assert_close(state, alone, rtol=1e-12, atol=1e-12)


def train_attached(rank: int) -> dict[str, Tensor]:
    """Without a mesh at conversion: bound to the data-parallel group afterwards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=NAMES)
    model = distnorm.convert(net(channels_of("different models", mesh.get_local_rank("other"))), "sync_bn")
    distnorm.attach(model, process_group=mesh.get_group("dp"))
    train(DistributedDataParallel(model, process_group=mesh.get_group("dp")), 2, mesh.get_local_rank("dp"))
    return model.state_dict()


def test_a_process_group_instead_of_a_mesh(pool: Pool) -> None:
    for rank, state in enumerate(pool.run(4, train_attached)):
        expected = joined(channels_of("different models", rank % 2), 2)
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-9)


def all_data(kind: str) -> DeviceMesh:
    if kind == "unnamed, 1 axis":
        return init_device_mesh("cpu", (4,))
    if kind == "unnamed, 2 axes":
        return init_device_mesh("cpu", (2, 2))
    mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("dp", "cp", "tp"))
    return mesh["dp", "cp"] if kind == "slice of 2 axes" else mesh["dp", "cp"]._flatten("data")


def train_on_all(rank: int, kind: str) -> dict[str, Tensor]:
    model = distnorm.convert(net(), "sync_bn", mesh=all_data(kind))
    train(DistributedDataParallel(model), 4, rank, steps=2)
    return model.state_dict()


@pytest.mark.parametrize("kind", ["unnamed, 1 axis", "unnamed, 2 axes", "slice of 2 axes", "flattened"])
def test_meshes_that_are_all_data(pool: Pool, kind: str) -> None:
    expected = net()
    train(expected, 4, None, steps=2)
    for state in pool.run(4, train_on_all, kind):
        torch.testing.assert_close(state, expected.state_dict(), rtol=1e-9, atol=1e-9)


def normalize(rank: int, axis: str) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, running means, and these united over the whole mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    layer = distnorm.convert(nn.BatchNorm2d(3).double(), "group_bn", axis=axis, mesh=mesh)
    y_NCS = layer(batch(0, 4)[0][rank * N :][:N])
    mean_C = layer.running_mean.clone()
    distnorm.sync_running_stats(layer)
    return y_NCS.detach(), mean_C, layer.running_mean


@pytest.mark.parametrize(
    ("axis", "groups"), [("dp", [(0, 2), (1, 3)]), ("cp", [(0, 1), (2, 3)]), ("local", [(0, 3), (1, 2)])]
)
def test_group_bn_along_an_axis(pool: Pool, axis: str, groups: list[tuple[int, ...]]) -> None:
    """``local`` is no axis of the mesh, so it means the nodes."""
    nodes = [{"GROUP_RANK": str(int(rank in (1, 2)))} for rank in range(4)]
    ranks = pool.run(4, normalize, axis, env=nodes)
    x_NCS = batch(0, 4)[0]
    parts = x_NCS.split(N)
    for members in groups:
        stock = nn.BatchNorm2d(3).double()
        expected = stock(torch.cat([parts[rank] for rank in members])).detach().split(N)
        for rank, y_NCS in zip(members, expected, strict=True):
            torch.testing.assert_close(ranks[rank][0], y_NCS)
            torch.testing.assert_close(ranks[rank][1], stock.running_mean)
    for rank in range(4):
        torch.testing.assert_close(ranks[rank][2], 0.1 * x_NCS.mean((0, 2, 3)))


def refuse(rank: int, case: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    if case == "unknown axis":
        layer = distnorm.convert(nn.BatchNorm2d(3), "group_bn", axis="tp", mesh=mesh)
    else:
        layer = distnorm.convert(nn.BatchNorm2d(3), "group_bn", axis="dp", mesh=init_device_mesh("cpu", (4,)))
    layer(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("unknown axis", r"mesh axis 'tp' is not an axis of the given mesh; it has \('dp', 'cp'\)"),
        ("unnamed mesh", r"mesh axis 'dp' is not an axis of the given mesh; it has \(\)"),
    ],
)
def test_every_rank_refuses_a_wrong_axis(pool: Pool, case: str, message: str) -> None:
    for error in pool.run_all(4, refuse, case, timeout=30):
        assert isinstance(error, ValueError)
        with pytest.raises(ValueError, match=message):
            raise error
