"""Whether all ranks converted the same: told through the job's store, before any collective."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.grid import Recipe
from distnorm.transport import Topology, mpi
from distnorm.transport.rendezvous import group_timeout, tell_and_collect
from distnorm.transport.topology import node_id
from distnorm.types import Transport


def fingerprint(recipe: Recipe, transport: Transport, layers: Sequence[tuple[str, _BatchNorm]]) -> list[str]:
    """What must be equal on all ranks, a line each."""
    lines = [repr(recipe), f"transport={transport!r}"]
    for name, layer in layers:
        lines.append(f"{name}: {layer.num_features} features, eps={layer.eps}, momentum={layer.momentum}")
    return lines


def agree(
    world: dist.ProcessGroup,
    ranks: tuple[int, ...],
    converted: list[str],
    mesh: DeviceMesh | None,
    mpi_device: torch.device | None,
) -> Topology:
    """Where ``ranks`` are, once they have told each other. Collective over them; no tensors move.

    Args:
        world: the job.
        ranks: those that share.
        converted: this rank's ``fingerprint``.
        mesh: their device mesh, if there is one.
        mpi_device: where statistics lie, if MPI carries them.

    Raises:
        RuntimeError: some rank did not answer, converted something else, or is not in one MPI job with the others.
    """
    timeout = group_timeout(world)
    place = None if mpi_device is None else mpi.place(mpi_device)
    mine = {"node": node_id(), "converted": converted, "mpi": place}
    told = [json.loads(text) for text in tell_and_collect(ranks, json.dumps(mine), timeout)]
    for rank, other in zip(ranks, told, strict=True):
        _compare(ranks[0], told[0]["converted"], rank, other["converted"])
    nodes = tuple(other["node"] for other in told)
    places = None if mpi_device is None else mpi.check_places(ranks, [other["mpi"] for other in told])
    return Topology(ranks, mesh=mesh, nodes=nodes, timeout=timeout, mpi=places)


def _compare(first: int, expected: list[str], rank: int, given: list[str]) -> None:
    if given == expected:
        return
    for line, other in zip_longest(expected, given, fillvalue="nothing"):
        if line != other:
            raise RuntimeError(
                f"distnorm: rank {rank} converted another model or recipe than rank {first}. Rank {first} has "
                f"[{line}] where rank {rank} has [{other}]. Build and convert the model alike on every rank that "
                "shares statistics, or bind each set of ranks with distnorm.attach(model, process_group=...)."
            )
