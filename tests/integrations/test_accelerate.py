"""Accelerate on 2 real ranks: ``prepare`` as the user writes it, optimizer steps, mixed precision, checkpoints."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOB = "tests/integrations/scripts/accelerate_job.py"


def run(script: str, *arguments: str, ranks: int = 2) -> str:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, script, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def result_of(output: str) -> dict[str, Any]:
    lines = [line.removeprefix("RESULT ") for line in output.splitlines() if line.startswith("RESULT ")]
    assert len(lines) == 1, output
    result: dict[str, Any] = json.loads(lines[0])
    return result


def agrees(result: dict[str, Any], reference: dict[str, Any]) -> None:
    """``sync_bn`` on 2 ranks trains as stock batch norm does in one process, on the joined batch."""
    assert (result["world_size"], reference["world_size"]) == (2, 1)
    assert len(result["losses"]) == 20
    assert result["losses"] == pytest.approx(reference["losses"], abs=1e-5)
    for name in ("running_mean", "running_var"):
        assert result[name] == pytest.approx(reference[name], abs=1e-4)
    assert result["accuracy"] == pytest.approx(reference["accuracy"], abs=0.002)


def of_ranks(folder: Path, phase: str) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{phase}_{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("accelerate")


@pytest.fixture(scope="module")
def trained(folder: Path) -> list[dict[str, Any]]:
    run(JOB, "train", str(folder))
    return of_ranks(folder, "train")


@pytest.fixture(scope="module")
def resumed(folder: Path, trained: Sequence[object]) -> list[dict[str, Any]]:
    run(JOB, "resume", str(folder))
    return of_ranks(folder, "resume")


@pytest.mark.slow
def test_the_example_trains_as_one_process_on_the_joined_batch() -> None:
    reference = result_of(run("examples/accelerate_plain.py", ranks=1))
    agrees(result_of(run("examples/accelerate_plugin.py", "sync_bn")), reference)


def test_a_step_of_moving_statistics_is_an_optimizer_step(trained: list[dict[str, Any]]) -> None:
    for rank in trained:
        # What save_model wrote evaluates in the stock model as the trained one.
        assert rank["accumulates"].pop("distance") < 1e-5
        # Two micro-batches and directions in the exact step that fills a window of one, then one for each step.
        assert rank["accumulates"] == {"forwards": 16, "steps": [8], "taken": 8, "collectives": 4 + 7}
        assert rank["successor"]["steps"] == [6]


def test_two_models_with_an_optimizer_each_end_their_own_steps(trained: list[dict[str, Any]]) -> None:
    for rank in trained:
        networks = rank["adversaries"]
        assert (networks["maker"], networks["made"]) == ([3], 3)
        assert (networks["critic"], networks["judged"]) == ([6], 6)
    assert trained[0]["adversaries"]["running"] == trained[1]["adversaries"]["running"]


def test_bf16_computes_in_bf16_and_keeps_running_statistics_in_fp32(trained: list[dict[str, Any]]) -> None:
    for rank in trained:
        assert rank["casts"]["dtypes"] == ["torch.bfloat16"]
        assert rank["casts"]["running"] == "torch.float32"
        assert len(rank["casts"]["losses"]) == 8 and all(map(math.isfinite, rank["casts"]["losses"]))


def test_a_growing_loss_scale_changes_nothing(trained: list[dict[str, Any]]) -> None:
    """Windows hold cotangents of several scales: without the scale wired, losses differ by 1e-3 and more."""
    for rank in trained:
        assert rank["scaled"]["scale"] == 1024 * 2**6
        assert rank["scaled"]["losses"] == pytest.approx(rank["unscaled"]["losses"], abs=1e-6)


@pytest.mark.slow
def test_a_fresh_job_resumes_bit_for_bit(trained: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> None:
    for before, after in zip(trained, resumed, strict=True):
        assert len(before["saves"]["losses"]) == 8
        assert after["whole"] == before["saves"]
    assert trained[0]["saves"]["losses"] != trained[1]["saves"]["losses"]


@pytest.mark.slow
def test_a_checkpoint_of_a_larger_job_starts_warm_from_rank_0(resumed: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(resumed):
        assert rank["larger"]["steps"] == [8]
        assert rank["larger"]["lines"][0].startswith(f"distnorm: rank {number} of 2 resumes from ")
        assert rank["larger"]["lines"][0].endswith("distnorm_state_0.pt, of a job of 4 ranks: windows start warm")


@pytest.mark.slow
def test_a_checkpoint_without_our_files_starts_cold_and_says_so(
    trained: list[dict[str, Any]], resumed: list[dict[str, Any]]
) -> None:
    for before, rank in zip(trained, resumed, strict=True):
        assert rank["lost"]["steps"] == [0]
        assert len(rank["lost"]["lines"]) == 1
        assert "lost/distnorm_state_0.pt" in rank["lost"]["lines"][0] and "start cold" in rank["lost"]["lines"][0]
        assert rank["lost"]["losses"] != before["saves"]["losses"]


@pytest.mark.parametrize("framework", ["accelerate", "transformers", "lightning"])
def test_a_missing_framework_names_the_extra(framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("accelerate", "accelerate.optimizer", "transformers", "lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"distnorm.integrations.{framework}", raising=False)
    with pytest.raises(ImportError, match=rf"pip install 'distnorm\[{framework}\]'"):
        importlib.import_module(f"distnorm.integrations.{framework}")
