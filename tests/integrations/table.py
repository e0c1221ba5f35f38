"""The tables of docs/integrations.md: launchers, frameworks and recipes on examples/task.py, with 2 real processes.

``python -m tests.integrations.table`` (or ``make integrations``) runs all rows and writes them into the page.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.task import LEARNING_RATE, STEPS, build_model, train_loader

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "integrations.md"
BIN = Path(sys.executable).parent
RECIPES = ("sync_bn", "mabn(window=8, warmup=8)")  # windows are full, and used, for most of the 40 steps
TORCHRUN = ("torchrun", "--standalone", "--nproc_per_node", "2")
RUN_MODULE = ("-m", "distnorm.run", "--ledger", "--recipe", "{recipe}")
MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2", sys.executable)

Write = Callable[[Path, str], Path]
"""Writes a file into a folder, given a recipe, and returns its path: the {file} of a command."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A job: what its command is, with {recipe} and {file} to be filled in."""

    launcher: str
    framework: str
    how: str
    command: tuple[str, ...]
    file: Write | None = None

    @property
    def name(self) -> str:
        return f"{self.launcher} | {self.framework} | {self.how}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a job ended with."""

    processes: int
    losses: list[float]
    final_loss: float
    running_mean: float
    running_var: float
    collectives: float | None  # per step, by the ledger where the job prints one


def without(example: str, word: str) -> Write:
    """An example without the lines that have ``word``: a script that knows nothing of distnorm."""

    def write(folder: Path, recipe: str) -> Path:
        lines = (ROOT / "examples" / example).read_text().splitlines(keepends=True)
        path = folder / f"plain_{example}"
        path.write_text("".join(line for line in lines if word not in line))
        return path

    return write


def deepspeed_json(**section: Any) -> Write:
    """launch/deepspeed/zero2.json for the recipe; sections of DeepSpeed's own can be added."""

    def write(folder: Path, recipe: str) -> Path:
        config = json.loads((ROOT / "launch" / "deepspeed" / "zero2.json").read_text())
        path = folder / "zero2.json"
        path.write_text(json.dumps({**config, **section, "distnorm": {"recipe": recipe, "ledger": True}}))
        return path

    return write


def accelerate_yaml(distributed_type: str, *, section: bool, precision: str = "no") -> Write:
    """launch/accelerate/cpu_2_ranks.yaml, with or without the section."""

    def write(folder: Path, recipe: str) -> Path:
        text = (ROOT / "launch" / "accelerate" / "cpu_2_ranks.yaml").read_text()
        text = text.replace("MULTI_CPU", distributed_type).replace("'no'", f"'{precision}'")
        text = text.partition("distnorm_config:")[0]
        if section:
            text += f"distnorm_config:\n  recipe: {recipe}\n  ledger: true\n"
        path = folder / "config.yaml"
        path.write_text(text)
        return path

    return write


ROWS = (
    Row(launcher="torchrun", framework="DDP", how="run module",
        command=(*TORCHRUN, *RUN_MODULE, "examples/ddp_plain.py")),
    Row(launcher="torchrun", framework="DDP", how="in code",
        command=(*TORCHRUN, "examples/ddp.py", "{recipe}")),
    Row(launcher="mpirun", framework="DDP", how="run module",
        command=(*MPIRUN, *RUN_MODULE, "examples/ddp_plain.py")),
    Row(launcher="mpirun", framework="DDP", how="in code, statistics by gloo",
        command=(*MPIRUN, "examples/mpi.py", "--recipe", "{recipe}", "--transport", "torch")),
    Row(launcher="mpirun", framework="DDP", how="in code, statistics by MPI",
        command=(*MPIRUN, "examples/mpi.py", "--recipe", "{recipe}", "--transport", "mpi")),
    Row(launcher="distnorm launch", framework="Accelerate", how="section of the YAML",
        command=("distnorm", "launch", "--config_file", "{file}", "examples/accelerate_plain.py"),
        file=accelerate_yaml("MULTI_CPU", section=True)),
    Row(launcher="accelerate launch", framework="Accelerate", how="run module",
        command=("accelerate", "launch", "--config_file", "{file}", *RUN_MODULE, "examples/accelerate_plain.py"),
        file=accelerate_yaml("MULTI_GPU", section=False)),
    Row(launcher="torchrun", framework="Accelerate", how="plugin",
        command=(*TORCHRUN, "examples/accelerate_plugin.py", "{recipe}")),
    Row(launcher="torchrun", framework="HF Trainer", how="run module",
        command=(*TORCHRUN, *RUN_MODULE, "examples/trainer_plain.py")),
    Row(launcher="torchrun", framework="HF Trainer", how="callback",
        command=(*TORCHRUN, "examples/trainer_callback.py", "{recipe}")),
    Row(launcher="torchrun", framework="DeepSpeed ZeRO 2", how="run module, section of the JSON",
        command=(*TORCHRUN, "-m", "distnorm.run", "{plain}", "{file}"), file=deepspeed_json()),
    Row(launcher="torchrun", framework="DeepSpeed ZeRO 2", how="in code, section of the JSON",
        command=(*TORCHRUN, "examples/deepspeed_engine.py", "{file}"), file=deepspeed_json()),
    Row(launcher="torchrun", framework="FSDP2", how="in code",
        command=(*TORCHRUN, "examples/fsdp2.py", "--recipe", "{recipe}")),
    Row(launcher="Lightning's own", framework="Lightning", how="run module",
        command=(sys.executable, *RUN_MODULE, "{file}"), file=without("lightning_plugin.py", "DistNorm")),
    Row(launcher="Lightning's own", framework="Lightning", how="plugin",
        command=(sys.executable, "examples/lightning_plugin.py", "--recipe", "{recipe}")),
)  # fmt: skip
