"""The configs in launch/accelerate, dry-run: what accelerate makes of each."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.utils import prepare_deepspeed_cmd_env
from torch.distributed import run as torchrun

from distnorm.cli import launch
from tests.integrations.launching import CONFIGS, TOP, isolated, recorded


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolated(monkeypatch, tmp_path)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return recorded(monkeypatch)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_file_is_explained_and_accelerate_accepts_the_rest(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    file = launch.ConfigFile.read(str(path))
    assert file.settings() is not None
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(file.for_accelerate()))
    assert load_config_from_file(str(copy)).num_processes == file.values["num_processes"]
    with pytest.raises(ValueError, match="unknown keys"):
        load_config_from_file(str(path))


def torchrun_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Any, list[str]]:
    """What torchrun would start: its configuration, and the arguments of a worker."""
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(torchrun, "run", seen.append)
    assert launch.main(list(arguments)) == 0
    configuration, _, worker = torchrun.config_from_args(seen[0])
    return configuration, worker


def test_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    configuration, worker = torchrun_command(
        monkeypatch, "--config_file", str(CONFIGS / "one_node.yaml"), "train.py", "--lr", "1"
    )
    assert (configuration.nproc_per_node, configuration.max_nodes) == (8, 1)
    assert worker == ["-u", "-m", "distnorm.run", "train.py", "--lr", "1"]


def test_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    configuration, worker = torchrun_command(
        monkeypatch, "--config_file", str(CONFIGS / "several_nodes.yaml"), "--machine_rank", "1", "-m", "pkg.train"
    )
    assert (configuration.nproc_per_node, configuration.min_nodes, configuration.max_nodes) == (8, 2, 2)
    assert configuration.rdzv_configs["rank"] == 1
    assert worker == ["-u", "-m", "distnorm.run", "-m", "pkg.train"]


def test_deepspeed(launched: dict[str, Any]) -> None:
    assert launch.main(["--config_file", str(CONFIGS / "deepspeed.yaml"), "train.py"]) == 0
    assert launched["launcher"] == "deepspeed"
    arguments = launched["arguments"]
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert (arguments.nproc_per_node, arguments.training_script_args) == ("8", ["train.py"])
    assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
    named = TOP / environment["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
    assert json.loads(named.read_text())["zero_optimization"]["stage"] == 2
