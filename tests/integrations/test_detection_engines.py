"""The detector under DeepSpeed and Lightning: the references of test_detection.py, one job of 2 ranks per engine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.test_detection import RANKS, leaves, train, train_joined
from tests.support.pool import Pool

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "integrations" / "scripts"
FAST = [f"{recipe}:{stage}" for recipe in ("sync_bn", "mabn") for stage in (0, 1, 2)]
SLOW = ["sync_bn:3", "mabn:3"]
Found = list[dict[str, Any]]


def torchrun(script: str, folder: Path, *cases: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'examples'}",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}"]
    command += [str(SCRIPTS / script), str(folder), *cases]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


def job(script: str, folder: Path, *cases: str) -> Found:
    done = torchrun(script, folder, *cases)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert done.stdout.count(": loss ") == RANKS and "nan" not in done.stdout  # the example itself, last
    found = [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]
    assert [each["ranks"] for each in found] == [RANKS] * RANKS
    return found


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return job("detection_deepspeed_job.py", tmp_path_factory.mktemp("deepspeed"), *FAST)


@pytest.fixture(scope="module")
def deepspeed_zero3(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return job("detection_deepspeed_job.py", tmp_path_factory.mktemp("deepspeed"), *SLOW)


@pytest.fixture(scope="module")
def lightning(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return job("detection_lightning_job.py", tmp_path_factory.mktemp("lightning"))


# DeepSpeed trains in float32 (or less), Lightning here in float64, as the references do.
def engines(recipe: str) -> pytest.MarkDecorator:
    rows = [pytest.param("deepspeed", f"{recipe}:{stage}", 1e-5, id=f"deepspeed zero {stage}") for stage in (0, 1, 2)]
    rows += [
        pytest.param("deepspeed_zero3", f"{recipe}:3", 1e-5, id="deepspeed zero 3"),
        pytest.param("lightning", recipe, 1e-9, id="lightning ddp"),
    ]
    return pytest.mark.parametrize(("engine", "case", "tolerance"), rows)


def close(given: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@engines("sync_bn")
def test_sync_bn_equals_stock_on_the_joined_batch(
    request: pytest.FixtureRequest, engine: str, case: str, tolerance: float
) -> None:
    expected = train_joined()
    for rank in request.getfixturevalue(engine):
        assert rank[case].get("stage", 0) == int(case.partition(":")[2] or 0)
        close(rank[case]["state"], expected, tolerance)


def centred(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights in front of a norm, as training uses them: under DeepSpeed they are stored otherwise."""
    ahead = ("stem.0.weight", "dense.0.weight", "box.0.weight")
    filters = {name: state[name].flatten(1) for name in ahead}
    return {**state, **{name: each - each.mean(1, keepdim=True) for name, each in filters.items()}}


@engines("mabn")
def test_mabn_shares_one_window_among_calls(
    request: pytest.FixtureRequest, pool: Pool, engine: str, case: str, tolerance: float
) -> None:
    """Ranks agree on what completed, though one of them had no boxes; and training is that of DDP."""
    first, second = (rank[case] for rank in request.getfixturevalue(engine))
    assert first["kept"][0]["step"] == second["kept"][0]["step"] == 12
    windows = [[value for name, value in leaves(each["kept"]) if "window" in name] for each in (first, second)]
    assert len(windows[0]) == 3 and any(value.any() for value in windows[0])
    torch.testing.assert_close(windows[1], windows[0], rtol=0, atol=0)
    torch.testing.assert_close(second["state"], first["state"], rtol=0, atol=0)
    (expected, _), _ = pool.run(RANKS, train, "ddp", "mabn", 12)
    close(centred(first["state"]), centred(expected), tolerance)


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_refuses_a_parameter_that_one_rank_leaves_out(tmp_path: Path, stage: int) -> None:
    """Once this fails, the limit in docs/deepspeed.md and the example's ``may_skip`` can go."""
    done = torchrun("detection_deepspeed_job.py", tmp_path, f"skips:{stage}")
    assert done.returncode != 0
    assert "Received data size doesn't match expected size" in done.stderr
