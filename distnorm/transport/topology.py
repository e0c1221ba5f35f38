"""Which ranks share: the data-parallel ranks, and the groups that a policy can name among them."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Collection, Mapping
from datetime import timedelta
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from distnorm.transport.direct import Declined, Direct
from distnorm.transport.group import Group, TorchGroup, backend_for
from distnorm.transport.make_group import make_group
from distnorm.transport.mpi import make_mpi_group
from distnorm.transport.rendezvous import all_gather_text, group_timeout
from distnorm.transport.schedule import schedule_of
from distnorm.types import Transport

_AVAILABLE = dist.is_available()
if _AVAILABLE:
    # On import, its functions use the job's group as default value of an argument, which keeps the group alive after it
    # is destroyed. torch 2.13 imports it at the first meta tensor. Imported before a job exists, they hold none.
    import torch.distributed.nn.functional  # noqa: F401

NODE_AXES = ("local", "node")

# Groups are resources of the process, as torch's are: layers and models that join the same ranks use one group. The
# keys are weak references to the job's group, so a destroyed job leaves nothing behind.
_groups: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[tuple[int, ...], bool, Transport], Group]] = (
    WeakKeyDictionary()
)


def current_world() -> dist.ProcessGroup | None:
    """Return the job's process group, or None for a single process without a job."""
    return dist.group.WORLD if _AVAILABLE else None


def node_id() -> str:
    """Return the name of this process's node: the launcher's if there is one, else the host name."""
    return os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or socket.gethostname()


def mesh_ranks(mesh: DeviceMesh, axes: Collection[str]) -> tuple[int, ...]:
    """Return the global ranks that differ from this one only along ``axes`` of ``mesh``; all of an unnamed mesh."""
    names = tuple(mesh.mesh_dim_names or ())
    unknown = sorted(set(axes) - set(names))
    if unknown:
        raise ValueError(f"mesh axis {unknown[0]!r} is not an axis of the given mesh; it has {names}.")
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"rank {dist.get_rank()} is not part of the given mesh {mesh}; bind on its ranks only.")
    if not names:
        return tuple(mesh.mesh.flatten().tolist())
    index = tuple(slice(None) if name in axes else at for name, at in zip(names, coordinate, strict=True))
    return tuple(mesh.mesh[index].flatten().tolist())


class Topology:
    """The data-parallel ranks of one model, in order, and how to create groups of them.

    Every group is our own, never DDP's: statistics must not queue behind gradient buckets, and a rank that skips a
    layer must not shift the order of DDP's collectives. Groups are created among their members only, in the order in
    which policies request them, which is the same on every rank that runs the same recipe.
    """

    def __init__(
        self,
        ranks: tuple[int, ...],
        *,
        mesh: DeviceMesh | None = None,
        nodes: tuple[str, ...] | None = None,
        timeout: timedelta | None = None,
        mpi: Mapping[int, int] | None = None,
        on_cpu: bool = True,
        transport: Transport = "torch",
        model: int = 0,
    ) -> None:
        """Describe ``ranks``; ``nodes`` names the node of each, and ``on_cpu``: all have layers on the CPU.

        ``mpi``: their ranks in MPI, if MPI is the transport. ``model``: its number, the same on all ranks.
        """
        self.ranks = ranks
        self.rank = dist.get_rank() if current_world() is not None else ranks[0]
        self.mesh = mesh
        self.nodes = nodes if nodes is not None else ("",) * len(ranks)
        self.timeout = timeout
        self.mpi = mpi
        self.on_cpu = on_cpu
        self.transport = transport
        self.model = model

    def everyone(self, *, background: bool = False) -> Group:
        """Return the group of all data-parallel ranks; ``background``: the one for asynchronous collectives."""
        return self._group(self.ranks, background)

    def blocks(self, size: int) -> Group:
        """Return this rank's block of ``size`` neighbouring ranks.

        Raises:
            ValueError: ``size`` does not divide the number of ranks.
        """
        world_size = len(self.ranks)
        if world_size % size:
            divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
            raise ValueError(
                f"group size {size} does not divide the {world_size} data-parallel ranks; allowed are {divisors}."
            )
        start = self.ranks.index(self.rank) // size * size
        return self._group(self.ranks[start : start + size])

    def along(self, axis: str, *, background: bool = False) -> Group:
        """Return the ranks along a mesh axis. Else ``"local"`` is this node, ``"node"`` the same place on every node.

        Raises:
            ValueError: no such axis, or ``"node"`` where nodes have different numbers of ranks.
        """
        if self.mesh is not None and (axis not in NODE_AXES or axis in (self.mesh.mesh_dim_names or ())):
            return self._group(mesh_ranks(self.mesh, (axis,)), background)
        if axis not in NODE_AXES:
            raise ValueError(f"axis {axis!r} needs a mesh: pass convert(..., mesh=...), or use one of {NODE_AXES}.")
        members: dict[str, list[int]] = {}
        for rank, node in zip(self.ranks, self.nodes, strict=True):
            members.setdefault(node, []).append(rank)
        mine = members[self.nodes[self.ranks.index(self.rank)]]
        if axis == "local":
            return self._group(tuple(mine), background)
        sizes = {node: len(ranks) for node, ranks in members.items()}
        if len(set(sizes.values())) > 1:
            raise ValueError(f'axis "node" needs equally many ranks on every node; given are {sizes}.')
        place = mine.index(self.rank)
        return self._group(tuple(ranks[place] for ranks in members.values()), background)

    def pair(self, axis: str | None) -> tuple[Group, Group]:
        """Return two groups over the ranks along ``axis``, or all: for blocking and for asynchronous collectives."""
        if axis is None:
            return self.everyone(), self.everyone(background=True)
        return self.along(axis), self.along(axis, background=True)

    def joining(self, process_group: dist.ProcessGroup) -> Group:
        """Return our own group over the ranks of the user's ``process_group``."""
        return self._group(tuple(dist.get_process_group_ranks(process_group)))

    def _group(self, ranks: tuple[int, ...], background: bool = False) -> Group:
        world = current_world()
        if world is None or len(ranks) == 1:
            return TorchGroup(None, ranks)
        known = _groups.setdefault(world, {})
        key = ranks, background, self.transport
        if key not in known:
            known[key] = self._make(world, ranks, background)
        return known[key]

    def _make(self, world: dist.ProcessGroup, ranks: tuple[int, ...], background: bool) -> Group:
        timeout = self.timeout if self.timeout is not None else group_timeout(world)
        if self.mpi is not None:
            return make_mpi_group(ranks, self.mpi, int(background), timeout)
        purpose = " ".join(
            ("background" if background else "blocking", *([] if self.transport == "torch" else [self.transport]))
        )
        # First what takes long and may fail on all ranks: a torch group could report only its own timeout.
        direct = None if background else self._direct(world, ranks, timeout)
        if direct is None:  # torch does not name missing ranks, and does not react to signals while it waits
            all_gather_text(ranks, "", timeout, doing="make a process group")
        process_group = make_group(ranks, purpose, timeout)
        blocking = _groups[world].get((ranks, False, self.transport))
        beside = blocking.direct if isinstance(blocking, TorchGroup) else None
        schedule = schedule_of(ranks, purpose, timeout)
        return TorchGroup(process_group, ranks, direct=direct, beside=beside, schedule=schedule)

    def _direct(self, world: dist.ProcessGroup, ranks: tuple[int, ...], timeout: timedelta) -> Direct | None:
        """Return the transport of small vectors in place of gloo; None if gloo sends them, or if gloo had none to send.

        Raises:
            RuntimeError: the transport that the user requires is not available; on all ``ranks``.
        """
        in_place_of_gloo = self.on_cpu and backend_for(world, "cpu") == "gloo"
        if self.transport == "gloo" or sys.platform != "linux" or not in_place_of_gloo:
            return None
        from distnorm.transport import shared_memory, sockets  # Linux only

        place = ranks, self.rank, timeout
        if self.transport == "torch":
            return shared_memory.join(*place) or sockets.join(*place)
        found = shared_memory.attempt(*place) if self.transport == "shm" else sockets.attempt(*place)
        if isinstance(found, Declined):
            raise RuntimeError(
                f"distnorm: transport={self.transport!r} is not available among ranks {list(ranks)}: {found.cause}. "
                "Use transport='torch' (DISTNORM_TRANSPORT=torch), which uses what is available."
            )
        return found
