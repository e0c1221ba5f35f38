"""The HF Trainer on 2 real ranks: what callbacks are given, optimizer steps, checkpoints, models without a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.test_accelerate import agrees, of_ranks, result_of, run

JOB = "tests/integrations/scripts/transformers_job.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformers")


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
    reference = result_of(run("examples/trainer_plain.py", ranks=1))
    agrees(result_of(run("examples/trainer_callback.py", "sync_bn")), reference)


def test_callbacks_are_given_the_unwrapped_model_and_the_prepared_optimizer(trained: list[dict[str, Any]]) -> None:
    for rank in trained:
        assert rank["processes"] == 2
        assert rank["init"] == ["Model", "DistBatchNorm2d"]
        assert rank["begin"] == ["Model", "DistBatchNorm2d"]
        assert rank["optimizer"] == ["AcceleratedOptimizer", "SGD"]
        assert rank["global_step"] == 0


def test_a_step_of_moving_statistics_is_an_optimizer_step(trained: list[dict[str, Any]]) -> None:
    for rank in trained:
        assert len(rank["losses"]) == 32
        assert rank["steps"] == [16]


def test_models_that_come_late_are_converted_too(trained: list[dict[str, Any]]) -> None:
    for rank in trained:
        assert [rank["late"][case] for case in ("model_init", "add_callback")] == [[3], [3]]


def test_a_saved_model_evaluates_in_stock_as_the_trained_one(trained: list[dict[str, Any]]) -> None:
    """AdamW, and statistics of the last step that are under way when it is saved."""
    for rank in trained:
        assert max(rank["late"][f"{case} saved"] for case in ("model_init", "add_callback")) < 1e-5


@pytest.mark.slow
def test_a_fresh_job_resumes_bit_for_bit(trained: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> None:
    for before, after in zip(trained, resumed, strict=True):
        assert after["global_step"] == 8
        assert after["steps"] == [16]
        assert after["losses"] == before["losses"][16:]
        assert after["values"] == before["values"]
    assert trained[0]["losses"] != trained[1]["losses"]
