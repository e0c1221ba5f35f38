"""Read a process's rank and world size from the variables of its launcher: Open MPI, MPICH, Intel MPI or SLURM."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

RENDEZVOUS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Below the ports that SLURM and operating systems assign. A busy port raises an error; it never joins another job.
_FIRST_PORT, _PORTS = 15_000, 15_000


@dataclass(frozen=True, kw_only=True)
class Place:
    """The ranks of a process in its job. A field is None if the launcher does not set it.

    Fields:
        launcher: name of the launcher, for messages.
        by_mpi: whether the launcher has set up MPI for its processes.
        node: the number of the node.
        first_host: name or address of the node of rank 0.
        job: an id that is equal on all ranks of the job, and differs from those of jobs that run at the same time.
    """

    launcher: str
    by_mpi: bool
    rank: int
    world_size: int
    local_rank: int | None = None
    local_world_size: int | None = None
    node: int | None = None
    first_host: str | None = None
    job: str | None = None

    def variables(self) -> dict[str, str]:
        """Return the known values under the names of the variables that torch and frameworks read."""
        known = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_WORLD_SIZE": self.local_world_size,
            "GROUP_RANK": self.node,
        }
        return {name: str(value) for name, value in known.items() if value is not None}


def has_rendezvous(environment: Mapping[str, str]) -> bool:
    """Return whether the variables of ``env://`` are set already, by torchrun or by the user.

    Raises:
        ValueError: the variables contradict those of the launcher.
    """
    if any(name not in environment for name in RENDEZVOUS):
        return False
    place = read_launcher(environment)
    torchrun = "TORCHELASTIC_RUN_ID" in environment  # which may run inside another launcher
    if place is not None and not torchrun and place.rank != int(environment["RANK"]):
        raise ValueError(
            f"RANK={environment['RANK']} is set, but {place.launcher} says that this is rank {place.rank} of "
            f"{place.world_size}. Unset {', '.join(RENDEZVOUS)} where the job is started."
        )
    return True


def read_launcher(environment: Mapping[str, str]) -> Place | None:
    """Return the place of this process, from the variables of its launcher, or None if there is no launcher."""
    if "OMPI_COMM_WORLD_SIZE" in environment:
        return _read_open_mpi(environment)
    if "PMI_SIZE" in environment and "PMI_RANK" in environment:
        return _read_hydra(environment)
    if "SLURM_PROCID" in environment and ("SLURM_STEP_NUM_TASKS" in environment or "SLURM_NTASKS" in environment):
        return _read_slurm(environment)
    return None


def meeting_point(place: Place, environment: Mapping[str, str]) -> tuple[str, int]:
    """Return the address and port of rank 0, from variables alone; they are the same on every rank.

    ``MASTER_ADDR`` and ``MASTER_PORT`` are used if set, else the first node and a port derived from the job's id.

    Raises:
        RuntimeError: the launcher's variables do not give an address and a port.
    """
    one_node = place.local_world_size == place.world_size
    host = environment.get("MASTER_ADDR") or ("127.0.0.1" if one_node else place.first_host)
    port = environment.get("MASTER_PORT") or (port_of(place.job) if place.job is not None else None)
    if host is None or port is None:
        missing = "MASTER_ADDR" if host is None else "MASTER_PORT"
        raise RuntimeError(
            f"{place.launcher} started {place.world_size} processes, but its variables do not give the address and "
            "port of rank 0. Install mpi4py (pip install 'distnorm[mpi]'), or set "
            f"{missing} to the same value on all of them."
        )
    return host, int(port)


def port_of(job: str) -> int:
    """Return a port derived from ``job``, so that it is the same on all ranks."""
    return _FIRST_PORT + zlib.crc32(job.encode()) % _PORTS


def expand_hosts(hosts: str) -> list[str]:
    """Expand SLURM's short form of a list of nodes: ``n[01-03,7],gpu5`` is n01, n02, n03, n7, gpu5.

    Raises:
        ValueError: the text does not have that form.
    """
    parts = re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", hosts)
    if ",".join(parts) != hosts:
        raise ValueError(f"{hosts!r} is not a list of nodes such as 'n[01-03,7],gpu5'.")
    return [host for part in parts for host in _expand(part)]


def _expand(pattern: str) -> Iterator[str]:
    head, bracket, rest = pattern.partition("[")
    if not bracket:
        yield head
        return
    choices, _, tail = rest.partition("]")
    for choice in choices.split(","):
        first, _, last = choice.partition("-")
        for number in range(int(first), int(last or first) + 1):
            yield from (f"{head}{number:0{len(first)}d}{end}" for end in _expand(tail))


def _read_open_mpi(environment: Mapping[str, str]) -> Place:
    return Place(
        launcher="Open MPI's mpirun (OMPI_COMM_WORLD_*)",
        by_mpi=True,
        rank=int(environment["OMPI_COMM_WORLD_RANK"]),
        world_size=int(environment["OMPI_COMM_WORLD_SIZE"]),
        local_rank=_number(environment, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_world_size=_number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE"),
        job=environment.get("PMIX_NAMESPACE") or environment.get("OMPI_MCA_ess_base_jobid"),
    )


def _read_hydra(environment: Mapping[str, str]) -> Place:
    return Place(
        launcher="mpiexec of MPICH or Intel MPI (PMI_*)",
        by_mpi=True,
        rank=int(environment["PMI_RANK"]),
        world_size=int(environment["PMI_SIZE"]),
        local_rank=_number(environment, "MPI_LOCALRANKID"),
        local_world_size=_number(environment, "MPI_LOCALNRANKS"),
    )


def _read_slurm(environment: Mapping[str, str]) -> Place:
    node = _number(environment, "SLURM_NODEID")
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE")
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    job = environment.get("SLURM_JOB_ID")
    return Place(
        launcher="srun (SLURM_*)",
        by_mpi="PMIX_RANK" in environment,
        rank=int(environment["SLURM_PROCID"]),
        world_size=int(environment.get("SLURM_STEP_NUM_TASKS") or environment["SLURM_NTASKS"]),
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_world_size=_expand_counts(tasks)[node] if tasks and node is not None else None,
        node=node,
        first_host=expand_hosts(hosts)[0] if hosts else environment.get("SLURM_LAUNCH_NODE_IPADDR"),
        job=f"{job}.{environment.get('SLURM_STEP_ID', '')}" if job is not None else None,
    )


def _expand_counts(counts: str) -> list[int]:
    """Expand SLURM's short form of counts: ``2(x3),1`` is 2, 2, 2, 1."""
    found: list[int] = []
    for part in counts.split(","):
        count, _, times = part.rstrip(")").partition("(x")
        found += [int(count)] * int(times or 1)
    return found


def _number(environment: Mapping[str, str], name: str) -> int | None:
    return int(environment[name]) if name in environment else None
