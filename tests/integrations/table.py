"""The tables of docs/integrations.md: launchers, frameworks and recipes on examples/task.py, with 2 real processes.

``python -m tests.integrations.table`` (or ``make integrations``) runs all rows and writes them into the page.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
"""Writes a file into a folder, given the folder and a recipe, and returns its path."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A job, and its command, which may hold {recipe} and names of ``files``, in braces as well."""

    launcher: str
    framework: str
    how: str
    command: tuple[str, ...]
    files: Mapping[str, Write] = field(default_factory=dict)

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


def without(example: str, word: str, replaced: str = "", by: str = "") -> Write:
    """An example without the lines that have ``word``, after a replacement: it knows nothing of distnorm then."""

    def write(folder: Path, recipe: str) -> Path:
        text = (ROOT / "examples" / example).read_text()
        assert word in text and replaced in text
        lines = (text.replace(replaced, by) if replaced else text).splitlines(keepends=True)
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
        command=("distnorm", "launch", "--config_file", "{yaml}", "examples/accelerate_plain.py"),
        files={"yaml": accelerate_yaml("MULTI_CPU", section=True)}),
    Row(launcher="accelerate launch", framework="Accelerate", how="run module",
        command=("accelerate", "launch", "--config_file", "{yaml}", *RUN_MODULE, "examples/accelerate_plain.py"),
        files={"yaml": accelerate_yaml("MULTI_GPU", section=False)}),
    Row(launcher="torchrun", framework="Accelerate", how="plugin",
        command=(*TORCHRUN, "examples/accelerate_plugin.py", "{recipe}")),
    Row(launcher="torchrun", framework="HF Trainer", how="run module",
        command=(*TORCHRUN, *RUN_MODULE, "examples/trainer_plain.py")),
    Row(launcher="torchrun", framework="HF Trainer", how="callback",
        command=(*TORCHRUN, "examples/trainer_callback.py", "{recipe}")),
    Row(launcher="torchrun", framework="DeepSpeed ZeRO 2", how="run module, section of the JSON",
        command=(*TORCHRUN, "-m", "distnorm.run", "{script}", "{json}"),
        files={"script": without("deepspeed_engine.py", "distnorm.integrations"), "json": deepspeed_json()}),
    Row(launcher="torchrun", framework="DeepSpeed ZeRO 2", how="in code, section of the JSON",
        command=(*TORCHRUN, "examples/deepspeed_engine.py", "{json}"), files={"json": deepspeed_json()}),
    Row(launcher="torchrun", framework="FSDP2", how="run module",
        command=(*TORCHRUN, *RUN_MODULE, "{script}"),
        files={"script": without("fsdp2.py", "distnorm", "distnorm.convert(build_model(), args.recipe, mesh=mesh)",
                                 "build_model()")}),
    Row(launcher="torchrun", framework="FSDP2", how="in code",
        command=(*TORCHRUN, "examples/fsdp2.py", "--recipe", "{recipe}")),
    Row(launcher="Lightning's own", framework="Lightning", how="run module",
        command=(sys.executable, *RUN_MODULE, "{script}"),
        files={"script": without("lightning_plugin.py", "DistNorm")}),
    Row(launcher="Lightning's own", framework="Lightning", how="plugin",
        command=(sys.executable, "examples/lightning_plugin.py", "--recipe", "{recipe}")),
)  # fmt: skip

BF16 = (
    Row(launcher="distnorm launch", framework="Accelerate", how="section of the YAML",
        command=("distnorm", "launch", "--config_file", "{yaml}", "examples/accelerate_plain.py"),
        files={"yaml": accelerate_yaml("MULTI_CPU", section=True, precision="bf16")}),
    Row(launcher="torchrun", framework="DeepSpeed ZeRO 2", how="in code, section of the JSON",
        command=(*TORCHRUN, "examples/deepspeed_engine.py", "{json}"),
        files={"json": deepspeed_json(torch_autocast={"enabled": True, "dtype": "bfloat16"})}),
    Row(launcher="torchrun", framework="FSDP2", how="in code",
        command=(*TORCHRUN, "examples/fsdp2.py", "--recipe", "{recipe}", "--bf16")),
    Row(launcher="Lightning's own", framework="Lightning", how="plugin",
        command=(sys.executable, "examples/lightning_plugin.py", "--recipe", "{recipe}", "--precision", "bf16-mixed")),
)  # fmt: skip


def measure(row: Row, recipe: str) -> Measured:
    """Run the job.

    Raises:
        RuntimeError: it failed, or printed no result.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(write(Path(folder), recipe)) for name, write in row.files.items()}
        command = [part.format(recipe=recipe, **files) for part in row.command]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("DISTNORM_")}
        environment = {
            **inherited,
            "PATH": f"{BIN}{os.pathsep}{inherited['PATH']}",
            "PYTHONPATH": str(ROOT / "examples"),  # for scripts that are written elsewhere
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "DS_ACCELERATOR": "cpu",
            "HF_HOME": folder,
        }
        job = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    results = [line.removeprefix("RESULT ") for line in job.stdout.splitlines() if line.startswith("RESULT ")]
    if job.returncode or len(results) != 1:
        raise RuntimeError(f"{' '.join(command)}\n{job.stdout}\n{job.stderr}")
    result = json.loads(results[0])
    totals = [line.split()[1] for line in job.stderr.splitlines() if line.startswith("total ")]
    return Measured(
        processes=result["world_size"],
        losses=result["losses"],
        final_loss=result["final_loss"],
        running_mean=sum(result["running_mean"]),
        running_var=sum(result["running_var"]),
        collectives=int(totals[0]) / STEPS if totals else None,
    )


def one_process() -> Measured:
    """Stock batch norm on the joined batches, in this process."""
    model, losses = build_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for images, labels in train_loader():
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    norms = [each for each in model if isinstance(each, nn.BatchNorm2d)]
    return Measured(
        processes=1,
        losses=losses[:20],
        final_loss=losses[-1],
        running_mean=sum(each.running_mean.double().sum().item() for each in norms),
        running_var=sum(each.running_var.double().sum().item() for each in norms),
        collectives=None,
    )


def difference(one: Measured, other: Measured) -> float:
    """The largest between losses of the first 20 steps."""
    return max(abs(mine - theirs) for mine, theirs in zip(one.losses, other.losses, strict=True))


def line(row: Row, recipe: str, found: Measured, reference: Measured) -> str:
    """A line of the table."""
    cells = [
        row.name,
        f"`{recipe}`",
        f"{found.final_loss:.5f}",
        f"{found.running_mean:.4f}",
        f"{found.running_var:.4f}",
        f"{difference(found, reference):.0e}" if recipe == "sync_bn" else "",
        "" if found.collectives is None else f"{found.collectives:g}",
    ]
    return f"| {' | '.join(cells)} |"


def read(name: str) -> dict[tuple[str, str], list[str]]:
    """The committed table: cells by job and recipe."""
    found = {}
    for text in _between(PAGE.read_text(), name)[1].splitlines()[3:]:
        launcher, framework, how, recipe, *cells = (each.strip() for each in text.strip("|").split("|"))
        found[f"{launcher} | {framework} | {how}", recipe.strip("`")] = cells
    return found


def write(name: str, rows: Sequence[Row], recipes: Sequence[str]) -> None:
    """Run ``rows`` and put them into the page."""
    reference = one_process()
    lines = [
        "| launcher | framework | how | recipe | final loss | Σ running mean | Σ running var | difference "
        "| collectives per step |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for recipe in recipes:
        for row in rows:
            lines.append(line(row, recipe, measure(row, recipe), reference))
            print(lines[-1], flush=True)
    before, _, after = _between(PAGE.read_text(), name)
    PAGE.write_text("\n".join([before, *lines, after]))


def _between(text: str, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, _, rest = text.partition(begin)
    inner, _, after = rest.partition(end)
    return before + begin, inner, end + after


if __name__ == "__main__":
    write("float32", ROWS, RECIPES)
    write("bfloat16", BF16, ("sync_bn",))
