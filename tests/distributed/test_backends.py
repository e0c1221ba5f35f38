"""Jobs with a backend for each device, or none that was named: who carries vectors on the CPU."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend "fake"
from torch import Tensor, nn
from torch.distributed import distributed_c10d

import distnorm
from distnorm.attach import conversions_of
from distnorm.transport import TorchGroup
from distnorm.transport.group import EXCHANGE_LIMIT_BYTES, backend_for
from distnorm.transport.make_group import make_group
from distnorm.transport.rendezvous import group_timeout
from distnorm.types import Slot
from tests.support.pool import Pool

TIMEOUT = timedelta(seconds=77)
SLOT = Slot("norm", "forward", 0)


def join_again(backend: str | None) -> dist.ProcessGroup:
    """The job anew, as the user's ``init_process_group`` makes it."""
    store = dist.PrefixStore("again", distributed_c10d._get_default_store())
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    dist.destroy_process_group()
    dist.init_process_group(backend, store=store, timeout=TIMEOUT, **place)
    world = dist.group.WORLD
    assert world is not None
    return world


def norm() -> nn.BatchNorm1d:
    return nn.BatchNorm1d(3).double()


def batch() -> Tensor:
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1


def bound_group(model: nn.Module) -> TorchGroup:
    (conversion,) = conversions_of(model)
    group = conversion.bound().topology.everyone()
    assert isinstance(group, TorchGroup)
    return group


class Seen(NamedTuple):
    """What a rank found."""

    way: str
    gloo_devices: tuple[str, ...]
    timeouts: set[timedelta]
    exchanges: list[int]
    totals: list[float]
    running: list[Tensor]


@pytest.mark.parametrize("backend", [None, "gloo", "cpu:gloo", "cpu:gloo,cuda:gloo", "cpu:gloo,cuda:fake"])
def test_vectors_on_the_cpu_go_where_gloo_would_take_them(pool: Pool, backend: str | None) -> None:
    stock = norm()
    stock(batch())
    for seen in pool.run(2, train, backend):
        assert seen.way == "SharedMemory"
        assert "cpu" in seen.gloo_devices
        assert ("cuda" in seen.gloo_devices) == (backend in ("gloo", "cpu:gloo,cuda:gloo"))
        assert seen.timeouts == {TIMEOUT}
        assert seen.exchanges == [
            2 * (3 + 2)
        ]  # float32, and who sends; memory takes float64, all_reduce what is larger
        assert seen.totals == [3.0, 3.0, 3.0]
        torch.testing.assert_close(seen.running, [stock.running_mean, stock.running_var], rtol=1e-12, atol=1e-12)


def train(rank: int, backend: str | None) -> Seen:
    world = join_again(backend)
    layer = distnorm.convert(norm(), "sync_bn")
    layer(batch().chunk(2)[rank]).square().sum().backward()
    group = bound_group(layer)
    exchanges: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        all_to_all = dist.all_to_all_single

        def exchange(received: Tensor, *args: Any, **kwargs: Any) -> Any:
            exchanges.append(received.numel())
            return all_to_all(received, *args, **kwargs)

        patch.setattr(dist, "all_to_all_single", exchange)
        totals = [
            float(group.sum(torch.full((size,), 1.0 + rank, dtype=dtype), SLOT)[-1])
            for size, dtype in (
                (3, torch.float64),
                (3, torch.float32),
                (EXCHANGE_LIMIT_BYTES // 4 + 1, torch.float32),
            )
        ]
    assert group.process_group is not None
    return Seen(
        type(group.direct).__name__,
        group.gloo_devices,
        {group_timeout(world), group_timeout(group.process_group)},
        exchanges,
        totals,
        [layer.running_mean, layer.running_var],
    )


def test_another_backend_carries_vectors_on_the_cpu(pool: Pool) -> None:
    """ "fake" moves nothing: a vector is left as it was where it goes by all_reduce, and gloo serves CUDA only."""
    for rank, (direct, gloo_devices, total) in enumerate(pool.run(2, sum_by_another)):
        assert direct is None
        assert gloo_devices == ("cuda",)
        assert total == [1.0 + rank] * 3


def sum_by_another(rank: int) -> tuple[object, tuple[str, ...], list[float]]:
    join_again("cpu:fake,cuda:gloo")
    layer = distnorm.convert(norm(), "sync_bn")
    distnorm.attach(layer)
    group = bound_group(layer)
    return group.direct, group.gloo_devices, group.sum(torch.full((3,), 1.0 + rank), SLOT).tolist()


def test_the_backend_of_a_device(pool: Pool) -> None:
    expected = {
        "cpu:gloo": ["gloo", None],
        "cpu:gloo,cuda:fake": ["gloo", "fake"],
        "cpu:fake,cuda:gloo": ["fake", "gloo"],
        "gloo": ["gloo", "gloo"],
    }
    for backend, names in expected.items():
        assert pool.run(1, backends, backend) == [names]


def backends(rank: int, backend: str) -> list[str | None]:
    world = join_again(backend)
    return [backend_for(world, device) for device in ("cpu", "cuda")]


def test_a_job_that_is_bound_to_a_device_is_not_split(pool: Pool) -> None:
    """NCCL splits communicators together with all ranks of the job; members of a group meet by themselves."""
    assert pool.run(1, make_in_a_bound_job) == [([None], "cuda:0", "cuda:0", "cuda:0")]


def make_in_a_bound_job(rank: int) -> tuple[list[object], str, str, str]:
    world = join_again("gloo")
    world.bound_device_id = torch.device("cuda:0")
    asked: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        # The helper looks for a communicator to split where the job has a device.
        patch.setattr(distributed_c10d, "_get_split_source", lambda group: asked.append(group))
        made = make_group((0,), "bound", TIMEOUT)
        after = world.bound_device_id
        with pytest.raises(ValueError, match="already been"):
            make_group((0,), "bound", TIMEOUT)
    return asked or [None], str(made.bound_device_id), str(after), str(world.bound_device_id)
