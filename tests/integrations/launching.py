"""``distnorm launch`` without workers: configs, and what accelerate would have started."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import launch as upstream

from distnorm.cli import launch

TOP = Path(__file__).parents[2]
CONFIGS = TOP / "launch" / "accelerate"
CPU = "distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\n"
OURS = "distnorm_config: {recipe: group_bn, options: {size: 1}, where: a.*}\n"
DROPPED = "starts 2 CPU processes with torchrun and ACCELERATE_USE_CPU=true"


def isolated(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """No settings of this machine; relative paths, and accelerate's default config, lie in ``folder``."""
    for name in list(os.environ):
        if name.startswith(("DISTNORM_", "ACCELERATE_")) or name.endswith(("WORLD_SIZE", "PMI_SIZE")):
            monkeypatch.delenv(name)
    monkeypatch.setattr("accelerate.commands.config.default_config_file", str(folder / "default_config.yaml"))
    monkeypatch.setattr(upstream, "default_config_file", str(folder / "default_config.yaml"))
    monkeypatch.chdir(folder)


def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Takes note of which of accelerate's launchers is called, with which arguments and environment; starts nothing."""
    seen: dict[str, Any] = {}
    for name in ("simple", "multi_gpu", "deepspeed"):

        def record(arguments: argparse.Namespace, name: str = name) -> None:
            seen.update(launcher=name, arguments=arguments, environment=dict(os.environ))

        monkeypatch.setattr(upstream, f"{name}_launcher", record)
    return seen


def plan(*arguments: str, **variables: str) -> launch.Job:
    return launch.plan(launch.parse(arguments), variables)


def write(text: str, name: str = "cfg.yaml") -> str:
    Path(name).write_text(text)
    return name
