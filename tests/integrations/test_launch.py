"""``distnorm launch``: two real processes that train."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from tests.integrations.launching import CONFIGS, DROPPED, TOP

SCRIPTS = Path(__file__).parent / "scripts"
PROGRAM = "import sys; from distnorm.cli.main import main; sys.exit(main())"


def command(
    *arguments: str,
    folder: Path,
    program: tuple[str, ...] = (sys.executable, "-c", PROGRAM, "launch"),
    **variables: str,
) -> subprocess.CompletedProcess[str]:
    """Run in ``folder``, with none of this machine's own settings."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("DISTNORM_", "ACCELERATE_"))}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder), **variables}
    return subprocess.run([*program, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("[0-9].json"))]


def assert_equal(reported: list[float], tensor: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(reported), tensor.detach(), atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def joined_batch() -> nn.BatchNorm2d:
    """The scripts' layer, trained in one process by stock torch on both processes' samples."""
    torch.manual_seed(0)
    images, classes = torch.randn(64, 3, 8, 8), torch.randint(4, (64,))
    norm = nn.BatchNorm2d(8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, targets in zip(images.split(8), classes.split(8), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return norm


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """A plain script, named relative to the folder, with an argument that looks like one of launch."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "code").mkdir()
    (folder / "code" / "train.py").write_text((SCRIPTS / "launch_plain.py").read_text())
    config = str(CONFIGS / "cpu_2_ranks.yaml")
    rest = ["code/train.py", "--num_processes", "7", "--report", "."]
    (folder / "temporary").mkdir()
    return command("--config_file", config, *rest, folder=folder, TMPDIR=str(folder / "temporary")), folder


def test_two_processes_train_converted_layers(trained: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    ended, folder = trained
    assert ended.returncode == 0, ended.stderr
    each = reports(folder)
    assert [report["rank"] for report in each] == [0, 1]
    assert {report["processes"] for report in each} == {2}
    assert {report["layer"] for report in each} == {"DistBatchNorm2d"}
    assert {report["device"] for report in each} == {"cpu"}
    assert {report["num_processes"] for report in each} == {7}
    assert DROPPED in ended.stderr


def test_it_equals_one_process_on_the_joined_batch(
    trained: tuple[subprocess.CompletedProcess[str], Path], joined_batch: nn.BatchNorm2d
) -> None:
    for report in reports(trained[1]):
        for name in ("weight", "running_mean", "running_var"):
            assert_equal(report[name], getattr(joined_batch, name))


def test_no_temporary_file_stays(trained: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    assert [path.name for path in (trained[1] / "temporary").iterdir() if path.name.startswith("distnorm")] == []


@pytest.mark.slow
def test_a_failing_script_ends_the_launch_as_under_accelerate(tmp_path: Path) -> None:
    config = str(CONFIGS / "cpu_2_ranks.yaml")
    ended = command("--config_file", config, str(SCRIPTS / "launch_exit.py"), folder=tmp_path)
    assert ended.returncode == 1
    assert "ChildFailedError" in ended.stderr and "exitcode  : 3" in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"DISTNORM_RECIPE": "sync_bn"}], ids=["plain", "converted"])
def test_exit_code_and_output_are_those_of_accelerate(tmp_path: Path, settings: dict[str, str]) -> None:
    script = tmp_path / "train.py"
    script.write_text("import sys; print('hello', sys.argv); sys.exit(3)")
    flags = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
    theirs = command(
        *flags, str(script), "--x", folder=tmp_path, program=(sys.executable, "-m", "accelerate.commands.launch")
    )
    ours = command(*flags, str(script), "--x", folder=tmp_path, **settings)
    assert (ours.returncode, ours.stdout) == (theirs.returncode, theirs.stdout)
    assert theirs.returncode == 1 and "hello" in theirs.stdout and "returned non-zero exit status 3" in ours.stderr


@pytest.mark.slow
def test_deepspeed_on_cpu(tmp_path: Path, joined_batch: nn.BatchNorm2d) -> None:
    config = yaml.safe_load((CONFIGS / "deepspeed.yaml").read_text())
    config["deepspeed_config"]["deepspeed_config_file"] = str(TOP / "launch" / "deepspeed" / "zero2.json")
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(config))
    ended = command(
        "--config_file", "cfg.yaml", "--num_processes", "2", str(SCRIPTS / "launch_deepspeed.py"), ".",
        folder=tmp_path, DS_ACCELERATOR="cpu",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    first, second = reports(tmp_path)
    assert first == second
    assert (first["processes"], first["kind"], first["zero_stage"]) == (2, "DEEPSPEED", 2)
    assert first["layer"] == "DistBatchNorm2d"
    for name in ("running_mean", "running_var"):
        assert_equal(first[name], getattr(joined_batch, name))
