"""What the variables of launchers mean: SLURM, Open MPI, MPICH and Intel MPI, torchrun."""

from __future__ import annotations

import socket

import pytest

from distnorm.integrations import mpi
from distnorm.integrations.launchers import expand_hosts, has_rendezvous, meeting_point, port_of, read_launcher


def slurm(**change: str) -> dict[str, str]:
    return {
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "81",
        "SLURM_TASKS_PER_NODE": "2",
        "SLURM_JOB_NODELIST": "node01",
        **change,
    }


def test_slurm() -> None:
    place = read_launcher(
        slurm(
            SLURM_PROCID="5",
            SLURM_NTASKS="8",
            SLURM_STEP_NUM_TASKS="7",
            SLURM_LOCALID="1",
            SLURM_NODEID="2",
            SLURM_TASKS_PER_NODE="2(x3),1",
            SLURM_JOB_NODELIST="node[01-03,7]",
            SLURM_LAUNCH_NODE_IPADDR="192.0.2.9",  # of the login node, where salloc ran
        )
    )
    assert place is not None
    assert place.variables() == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "2",
    }
    assert meeting_point(place, {}) == ("node01", port_of("81.0"))
    assert meeting_point(place, {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "77"}) == ("10.0.0.1", 77)


def test_slurm_without_a_list_of_nodes() -> None:
    variables = slurm(SLURM_TASKS_PER_NODE="1(x2)", SLURM_LAUNCH_NODE_IPADDR="192.0.2.9")
    del variables["SLURM_JOB_NODELIST"]
    place = read_launcher(variables)
    assert place is not None and meeting_point(place, {})[0] == "192.0.2.9"


def test_open_mpi() -> None:
    variables = {
        "OMPI_COMM_WORLD_RANK": "3",
        "OMPI_COMM_WORLD_SIZE": "4",
        "OMPI_COMM_WORLD_LOCAL_RANK": "3",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
        "PMIX_NAMESPACE": "prterun-host-12@1",
    }
    inherited = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}  # mpirun inside of a batch script
    place = read_launcher({**inherited, **variables})
    assert place is not None and place.by_mpi
    assert place.variables() == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
    assert meeting_point(place, {}) == ("127.0.0.1", port_of("prterun-host-12@1"))


def test_mpich_and_intel() -> None:
    variables = {"PMI_RANK": "1", "PMI_SIZE": "6", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "3"}
    place = read_launcher(variables)
    assert place is not None and place.by_mpi
    assert place.variables() == {"RANK": "1", "WORLD_SIZE": "6", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3"}
    with pytest.raises(RuntimeError, match=r"started 6 processes.*distnorm\[mpi\].*MASTER_ADDR"):
        meeting_point(place, {})


def test_torchrun_comes_first_and_stale_variables_are_found_out() -> None:
    torchrun = {"RANK": "2", "WORLD_SIZE": "4", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    assert has_rendezvous(torchrun)
    assert has_rendezvous({**torchrun, **slurm(), "TORCHELASTIC_RUN_ID": "x"})
    with pytest.raises(ValueError, match=r"RANK=2 is set, but srun.*rank 0 of 2.*Unset RANK"):
        has_rendezvous({**torchrun, **slurm()})
    assert not has_rendezvous(slurm())


def test_no_launcher() -> None:
    assert read_launcher({"RANK": "1"}) is None


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("node01", ["node01"]),
        ("node[01-03,7]", ["node01", "node02", "node03", "node7"]),
        ("a,b[9-11],c", ["a", "b9", "b10", "b11", "c"]),
        ("r[0-1]n[1,2]-ib", ["r0n1-ib", "r0n2-ib", "r1n1-ib", "r1n2-ib"]),
    ],
)
def test_lists_of_nodes(hosts: str, expected: list[str]) -> None:
    assert expand_hosts(hosts) == expected


def test_a_broken_list_of_nodes() -> None:
    with pytest.raises(ValueError, match="is not a list of nodes"):
        expand_hosts("node[1-2")


def test_ports_are_those_that_nobody_hands_out() -> None:
    ports = {port_of(str(job)) for job in range(2000)}
    assert min(ports) >= 1024 and max(ports) < 32768 and len(ports) > 1800


def test_the_address_is_no_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"other": "127.0.1.1", socket.gethostname(): "10.1.2.3"}
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda name, *_: [(2, 1, 6, "", (known[name], 0))] if name in known else []
    )
    assert mpi._address_towards(["other"]) == "10.1.2.3"
    known[socket.gethostname()] = "127.0.1.1"
    with pytest.raises(RuntimeError, match=r"other could reach.*MASTER_ADDR"):
        mpi._address_towards(["other"])
