"""A worker dies: the others notice, torchrun starts the job again, and it goes on as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distnorm
from tests.support.pool import Pool, WorkerDiedError

EXAMPLES = Path(__file__).parents[2] / "examples"
# torch 2.13: without it a job that torchrun restarts meets the addresses of its first attempt (pytorch#135712).
ENVIRONMENT = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}


def torchrun(ranks: int, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    command = [*torchrun, "--nproc_per_node", str(ranks), str(EXAMPLES / "elastic.py"), str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def results(output: str) -> list[tuple[str, ...]]:
    """Rank, ranks, first step and fingerprint, by rank."""
    return sorted(re.findall(r"RESULT rank (\d) of (\d) started at step (\d+) state (\w{64})", output))


def train(rank: int, folder: str, steps: int) -> str:
    sys.path.insert(0, str(EXAMPLES))
    import elastic

    return elastic.train(Path(folder), steps)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A job of 2 ranks; the second is killed at step 25 of the first attempt, 5 steps after a checkpoint."""
    folder = tmp_path_factory.mktemp("killed")
    return folder, torchrun(2, folder, "--kill-at", "25")


@pytest.mark.slow
def test_a_killed_job_ends_as_one_that_was_not(
    pool: Pool, killed: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    _, job = killed
    assert job.returncode == 0, job.stderr
    assert "exitcode: -9" in job.stderr
    found = results(job.stdout)
    assert [each[:3] for each in found] == [("0", "2", "20"), ("1", "2", "20")]
    undisturbed = pool.run(2, train, str(tmp_path), 40, timeout=100)
    assert [f"started at step 0 state {each[3]}" for each in found] == undisturbed
    assert len(set(undisturbed)) == 1
    assert "cold" not in job.stderr and "warm" not in job.stderr


@pytest.mark.slow
def test_another_world_size_starts_warm(killed: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = killed
    (folder / "latest").write_text("20")
    job = torchrun(1, folder, "--steps", "25")
    assert job.returncode == 0, job.stderr
    assert [each[:3] for each in results(job.stdout)] == [("0", "1", "20")]
    assert "of a job of 2 ranks: windows start warm" in job.stderr


def test_three_ranks_become_two(pool: Pool, tmp_path: Path) -> None:
    pool.run(3, train, str(tmp_path), 10, timeout=100)
    ends = pool.run(2, train, str(tmp_path), 20, timeout=100)
    assert all(end.startswith("started at step 10 ") for end in ends)
    assert len(set(ends)) == 1


def lose_a_peer(rank: int, recipe: str) -> None:
    torch.manual_seed(rank)
    model = distnorm.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), recipe)
    model = DistributedDataParallel(model)
    for step in range(200):
        if rank == 1 and step == 150:
            os.kill(os.getpid(), signal.SIGKILL)
        model(torch.randn(2, 3, 6, 6)).square().mean().backward()


@pytest.mark.parametrize("recipe", ["sync_bn", "mabn"])
def test_a_dead_peer_is_noticed_long_before_the_timeout(pool: Pool, recipe: str) -> None:
    pool.run(2, str)  # processes are up
    began = time.monotonic()
    survivor, dead = pool.run_all(2, lose_a_peer, recipe, timeout=60, group_timeout=60)
    assert isinstance(dead, WorkerDiedError) and isinstance(survivor, RuntimeError)
    assert time.monotonic() - began < 30
