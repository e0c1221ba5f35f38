"""``distnorm launch``: what accelerate is given, and what is refused."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands import launch as upstream

from distnorm.cli import launch
from distnorm.settings import SECTION_VARIABLE, from_environment
from tests.integrations.launching import CPU, OURS, isolated, plan, recorded, write


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolated(monkeypatch, tmp_path)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return recorded(monkeypatch)


def test_the_section_reaches_the_workers_and_not_accelerate(launched: dict[str, Any]) -> None:
    assert launch.main(["--config_file", write(CPU + OURS), "train.py"]) == 0
    settings = from_environment(launched["environment"])
    assert settings is not None and settings.source == "cfg.yaml, section distnorm_config"
    assert settings.section() == {"recipe": "group_bn", "options": {"size": 1}, "where": ["a.*"]}
    assert SECTION_VARIABLE not in os.environ
    assert yaml.safe_load(Path("cfg.yaml").read_text())["distnorm_config"]["recipe"] == "group_bn"


def test_json_config(launched: dict[str, Any]) -> None:
    values = {"distributed_type": "MULTI_GPU", "num_processes": 3, "distnorm_config": {"recipe": "mabn"}}
    assert launch.main(["--config_file", write(json.dumps(values), "cfg.json"), "train.py"]) == 0
    settings = from_environment(launched["environment"])
    assert settings is not None and settings.recipe == "mabn"
    assert (launched["launcher"], launched["arguments"].num_processes) == ("multi_gpu", 3)


def test_the_default_file_of_accelerate_counts(launched: dict[str, Any], tmp_path: Path) -> None:
    Path("default_config.yaml").write_text(CPU + OURS)
    assert launch.main(["train.py"]) == 0
    settings = from_environment(launched["environment"])
    assert settings is not None and settings.source == f"{tmp_path}/default_config.yaml, section distnorm_config"
    assert launched["arguments"].num_processes == 2


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["train.py", "--cpu", "-m", "--", "--config_file"], ["train.py", "--cpu", "-m", "--", "--config_file"]),
        (["-m", "pkg.train", "-m", "x"], ["-m", "pkg.train", "-m", "x"]),
        (["--module", "pkg.train"], ["-m", "pkg.train"]),
        (["code/train.py"], ["code/train.py"]),
    ],
)  # fmt: skip
def test_workers_run_the_script_through_the_run_module(given: list[str], wanted: list[str]) -> None:
    theirs = upstream.launch_command_parser().parse_args(given)
    rest = theirs.training_script_args
    job = plan("--config_file", write(CPU + OURS), *given)
    assert job.arguments.module and job.arguments.training_script == "distnorm.run"
    assert job.arguments.training_script_args == wanted
    assert rest == wanted[len(wanted) - len(rest) :]  # as accelerate hands them on


def test_a_program_that_is_not_python_runs_as_it_is() -> None:
    job = plan("--config_file", write(CPU + OURS), "--no_python", "run.sh", "x")
    assert (job.arguments.training_script, job.arguments.training_script_args) == ("run.sh", ["x"])
    assert job.arguments.no_python and not job.arguments.module
    assert SECTION_VARIABLE in job.environment
    assert "only if it starts `python -m distnorm.run`" in job.notes[0]


@pytest.mark.parametrize("arguments", [["--config_file", "cfg.yaml"], []], ids=["no-section", "no-file"])
def test_without_settings_it_is_accelerate(
    arguments: list[str], launched: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    write(CPU)
    assert launch.main([*arguments, "train.py", "x"]) == 0
    ours = launched["arguments"]
    upstream.launch_command(upstream.launch_command_parser().parse_args([*arguments, "train.py", "x"]))
    assert vars(ours) == vars(launched["arguments"])
    assert ours.training_script == "train.py" and SECTION_VARIABLE not in launched["environment"]
    err = capsys.readouterr().err
    assert err.count("nothing is converted, as under `accelerate launch`") == 1
    assert ("cfg.yaml has no section distnorm_config" in err) == bool(arguments)


def test_variables_do_without_a_section() -> None:
    job = plan("--config_file", write(CPU), "train.py", DISTNORM_RECIPE="sync_bn")
    assert job.arguments.training_script == "distnorm.run"
    assert SECTION_VARIABLE not in job.environment


@pytest.mark.parametrize(
    ("text", "flags", "variables", "message"),
    [
        (CPU + "distnorm_config: {recip: mabn}\n", [], {}, "cfg.yaml, section distnorm_config: unknown key 'recip'"),
        (CPU + "distnorm_config: {recipe: mabm}\n", [], {}, "unknown recipe 'mabm' (did you mean 'mabn'?)"),
        (CPU + "distnorm: {recipe: mabn}\n", [], {}, "unknown key 'distnorm' (did you mean 'distnorm_config'?)"),
        (CPU + "\tx: 1\n", [], {}, "cfg.yaml, line 4"),
        (CPU, [], {"DISTNORM_RECIPE": "mabm"}, "environment DISTNORM_*: unknown recipe 'mabm'"),
        ("distributed_type: XLA\n" + OURS, [], {}, "TPU and SageMaker cannot run"),
        (CPU + OURS, ["--tpu"], {}, "TPU and SageMaker cannot run"),
        ("distributed_type: DEEPSPEED\nnum_machines: 2\nnum_processes: 4\n" + OURS, [], {}, "launcher: standard"),
    ],
)
def test_bad_settings_exit_with_2(
    text: str,
    flags: list[str],
    variables: Mapping[str, str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launch.main(["--config_file", write(text), *flags, "train.py"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("distnorm launch: error: ") and message in err and err.count("\n") == 1


def test_a_missing_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--config_file", "gone.yaml", "train.py"]) == 2
    assert "gone.yaml is not a file. `accelerate config --config_file gone.yaml` creates one" in capsys.readouterr().err


def test_errors_of_accelerate_name_the_users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    config = write(CPU + OURS + "frobnicate: 1\n")
    with pytest.raises(ValueError, match=r"The config file at cfg\.yaml had unknown keys \(\['frobnicate'\]\)"):
        launch.main(["--config_file", config, "train.py"])
    assert list((tmp_path / "temporary").iterdir()) == []


def test_no_script(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        launch.main([])
    assert stopped.value.code == 2
    assert "the following arguments are required: training_script" in capsys.readouterr().err


def test_help_on_further_options_is_that_of_accelerate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stopped:
        launch.parse(["--help"])
    assert stopped.value.code == 0
    ours = capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["distnorm launch", "--help"])
    parser = upstream.launch_command_parser()
    parser.prog = "distnorm launch"
    assert ours == parser.format_help()
    assert "--deepspeed_config_file" in ours
