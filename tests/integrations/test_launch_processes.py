"""``distnorm launch``: how many processes a job has, and what is said if that is not what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands import launch as upstream

from distnorm.cli import launch
from distnorm.settings import SECTION_VARIABLE, from_environment
from tests.integrations.launching import CONFIGS, CPU, DROPPED, OURS, isolated, plan, recorded, write


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolated(monkeypatch, tmp_path)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return recorded(monkeypatch)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], CPU),
        ([], CPU.replace("MULTI_CPU", "MULTI_GPU")),
        ([], CPU.replace("MULTI_CPU", "'NO'") + "gpu_ids: '0'\n"),
        (["--cpu"], CPU),
        (["--cpu", "--num_processes", "2"], "distributed_type: 'NO'\n"),
        (["--num_processes", "2"], "distributed_type: MULTI_CPU\nuse_cpu: true\n"),
    ],
)
def test_cpu_processes_that_accelerate_would_drop_all_start(
    flags: list[str], text: str, launched: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(["--config_file", write(text + OURS), *flags, "train.py"]) == 0
    assert launched["launcher"] == "multi_gpu"
    assert launched["arguments"].num_processes == 2 and launched["arguments"].use_cpu
    assert launched["environment"]["ACCELERATE_USE_CPU"] == "true"
    assert capsys.readouterr().err.count(DROPPED) == 1


def test_cpu_flag_leaves_the_hardware_of_the_default_file_alone(launched: dict[str, Any]) -> None:
    write("distributed_type: DEEPSPEED\nnum_machines: 4\nnum_processes: 32\n" + OURS, "default_config.yaml")
    assert launch.main(["--cpu", "--num_processes", "2", "train.py"]) == 0
    assert (launched["launcher"], launched["arguments"].num_machines) == ("multi_gpu", 1)
    settings = from_environment(launched["environment"])
    assert settings is not None and settings.recipe == "group_bn"


@pytest.mark.parametrize("arguments", [["--cpu", "--num_processes", "2"], ["--config_file", "cfg.yaml"]])
def test_accelerate_still_drops_them(arguments: list[str], launched: dict[str, Any]) -> None:
    """Else the detour by torchrun can go: accelerate 1.15, huggingface/accelerate#2741."""
    write(CPU)
    upstream.launch_command(upstream.launch_command_parser().parse_args([*arguments, "train.py"]))
    assert launched["launcher"] == "simple"
    assert launched["arguments"].num_processes == 2 and launched["arguments"].mpirun_hostfile is None


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        (CPU + "mpirun_config: {mpirun_hostfile: hosts}\n", {}),
        (CPU, {"OMPI_COMM_WORLD_SIZE": "2"}),
        (CPU.replace("MULTI_CPU", "MULTI_GPU"), {"ACCELERATE_USE_CPU": "true"}),
        (CPU.replace("MULTI_CPU", "DEEPSPEED"), {}),
    ],
    ids=["hostfile", "under-mpirun", "torchrun", "deepspeed"],
)
def test_jobs_that_have_their_processes_are_left_alone(text: str, variables: dict[str, str]) -> None:
    config = write(text + "distnorm_config: {recipe: sync_bn}\n")
    job = plan("--config_file", config, "train.py", **variables)
    assert job.config == yaml.safe_load(text)
    assert job.notes == [] and list(job.environment) == [SECTION_VARIABLE]


@pytest.mark.parametrize(
    ("flags", "text", "variables"),
    [
        (["--num_processes", "1"], CPU, {}),
        ([], "distributed_type: 'NO'\n", {}),
        ([], "distributed_type: 'NO'\nnum_processes: 2\n", {}),
        ([], "distributed_type: DEEPSPEED\nnum_processes: 1\n", {}),
    ],
)
def test_one_process_and_a_synchronizing_recipe(flags: list[str], text: str, variables: dict[str, str]) -> None:
    config = write(text + "distnorm_config: {recipe: mabn}\n")
    (note,) = plan("--config_file", config, *flags, "train.py", **variables).notes
    assert note.startswith("warning: one process only, so mabn has nothing to share. Set num_processes")
    assert "--cpu" in note
    assert plan("--config_file", config, *flags, "train.py", DISTNORM_RECIPE="local_bn").notes == []


def without_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


def test_processes_that_each_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    without_accelerator(monkeypatch)
    (note,) = plan("--config_file", str(CONFIGS / "one_node.yaml"), "train.py").notes
    assert "no accelerator here, so each of 8 processes trains alone and sync_bn has nothing to share" in note
    assert "use_cpu: true" in note


def test_with_accelerators_there_is_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 8)
    assert plan("--config_file", str(CONFIGS / "one_node.yaml"), "train.py").notes == []
    assert plan("--num_processes", "8", "train.py", DISTNORM_RECIPE="sync_bn").notes == []
    assert plan("train.py", DISTNORM_RECIPE="sync_bn").notes == []
