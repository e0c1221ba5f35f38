"""Started by mpirun: train over gloo and over MPI, and leave what came out in the folder that is given."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock
from weakref import ref

import torch
import torch.distributed as dist
from mpi4py import MPI
from torch import nn

import distnorm
from distnorm.integrations import mpi
from distnorm.transport import mpi as transport
from tests.distributed.jobs import Plan, net, train

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=10)
CASES: dict[int, list[tuple[str, dict[str, Any]]]] = {
    2: [("sync_bn", {}), ("mabn", {"warmup": 2, "window": 3}), ("lazy_bn", {"warmup": 2})],
    4: [("sync_bn", {}), ("group_bn", {"size": 2}), ("hierarchical_bn", {}), ("mabn", {"warmup": 2, "window": 3})],
}


def trainings(rank: int, world_size: int) -> dict[tuple[str, str], Any]:
    plan = Plan(world_size=world_size, steps=6)
    return {
        (recipe, carrier): train(rank, plan, recipe, {**options, "transport": carrier})
        for recipe, options in CASES[world_size]
        for carrier in ("torch", "mpi")
    }


def counted(rank: int, carrier: str) -> tuple[int, int, bool]:
    model = distnorm.convert(net(), "sync_bn", transport=carrier)
    x_NCS = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with distnorm.Ledger(model) as ledger:
        model(x_NCS).square().sum().backward()
    return ledger.collectives, ledger.bytes, ledger.seconds > 0


def error_of(transports: list[str], place: dict[str, Any] | None = None) -> str:
    """What binding says to a rank, where ranks convert for ``transports`` or MPI tells them ``place``."""
    layer = distnorm.convert(nn.BatchNorm1d(2), "sync_bn", transport=transports[dist.get_rank()])
    told = transport.place if place is None else lambda device: place
    try:
        with mock.patch.object(transport, "place", told):
            layer(torch.randn(4, 2))
    except RuntimeError as error:
        return str(error)
    return "no error"


def sums(rank: int) -> list[bytes]:
    """The bits of sums of many sizes: of rounding errors above all."""
    group = transport.make_mpi_group((0, 1, 2, 3), {each: each for each in range(4)}, 7, TIMEOUT)
    generator = torch.Generator().manual_seed(rank)
    payloads = [torch.randn(2**power + 1, generator=generator, dtype=torch.float64).exp() for power in range(0, 18, 3)]
    blocking = [group.sum(payload, SLOT) for payload in payloads]
    background = [group.sum_async(payload.clone(), SLOT).wait() for payload in payloads]
    return [each.numpy().tobytes() for each in blocking + background]


def abandoned(rank: int) -> bool:
    """Whether the memory of a sum that nobody waits for lives on."""
    group = transport.make_mpi_group((0, 1, 2, 3), {each: each for each in range(4)}, 8, TIMEOUT)
    payload = torch.ones(129)
    alive = ref(payload)
    group.sum_async(payload, SLOT)
    del payload
    return alive() is not None


SLOT = distnorm.types.Slot("test", "forward", 0)


def main(folder: Path) -> None:
    found: dict[str, Any] = {"mpi": (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)}
    if MPI.COMM_WORLD.size == 2:
        mpi.init_process_group(timeout=TIMEOUT)
    else:
        mpi.export_environment()
        dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found["torch"] = rank, world_size
    found["environment"] = {name: os.environ[name] for name in NAMES}
    if world_size == 4:
        os.environ["GROUP_RANK"] = str(rank // 2)  # two nodes, as far as hierarchical_bn can tell
        found["sums"] = sums(rank)
        found["abandoned"] = abandoned(rank)
    found["trained"] = trainings(rank, world_size)
    if world_size == 2:
        found["counted"] = {carrier: counted(rank, carrier) for carrier in ("torch", "mpi")}
        found["mixed"] = error_of(["torch", "mpi"])
        found["strangers"] = error_of(["mpi", "mpi"], {"rank": 0, "size": 1, "device": "cpu", "threads": True})
        dist.barrier()
        dist.destroy_process_group()
        found["no torch"] = error_of_alone()
        dist.init_process_group("gloo", init_method=f"file://{folder}/swapped", rank=1 - rank, world_size=2)
        found["swapped"] = train(1 - rank, Plan(world_size=2), "sync_bn", {"transport": "mpi"})
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def error_of_alone() -> str:
    layer = distnorm.convert(nn.BatchNorm1d(2), "sync_bn", transport="mpi")
    try:
        layer(torch.randn(4, 2))
    except RuntimeError as error:
        return str(error)
    return "no error"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
