"""The table of scripts in docs/integrations.md: training scripts in the styles of other projects, and shipped ones.

``make scripts`` runs all rows with 2 real processes on generated pictures, and writes them into the page. Scripts
around torchvision and timm need the environment of ``make zoo``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from tests.integrations import table
from tests.integrations.styles import pictures
from tests.integrations.table import BIN, PAGE, ROOT

STYLES = Path(__file__).parent / "styles"
NAME = "scripts"
MOVING = "mabn(window=4, warmup=4)"
ZOO = ROOT / ".venv-zoo" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


@dataclass(frozen=True, kw_only=True)
class Script:
    """A script, its arguments for 2 processes, those for one with the joined batch, and who starts its processes."""

    name: str
    arguments: tuple[str, ...]
    joined: tuple[str, ...] = ()
    starts_itself: bool = False
    is_module: bool = False

    @property
    def command(self) -> list[str]:
        return ["-m", self.name] if self.is_module else [str(STYLES / self.name)]


SCRIPTS = (
    Script(
        name="classification.py",
        arguments=("--data-path", "{data}", "--model", "resnet18", "--model-ema", "--double", "--batch-size", "4"),
        joined=("--batch-size", "8"),
    ),
    Script(name="timm_training.py", arguments=("{data}", "--double", "-b", "4"), joined=("-b", "8")),
    Script(
        name="adversarial.py",
        arguments=("--dataroot", "{data}", "--batchSize", "4"),
        joined=("--batchSize", "8"),
    ),
    Script(
        name="trainer.py",
        arguments=("--data_dir", "{data}", "--per_device_train_batch_size", "4"),
        joined=("--per_device_train_batch_size", "8"),
    ),
    Script(
        name="lightning_demo.py",
        arguments=("--devices", "2", "--batch-size", "4"),
        joined=("--devices", "1", "--batch-size", "8"),
        starts_itself=True,
    ),
    Script(name="accelerate.test_utils.scripts.test_script", arguments=(), is_module=True),
)
WAYS = (("plain", ""), ("run module", "sync_bn"), ("distnorm launch", "sync_bn"), ("run module", MOVING))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The losses of a job, none if it prints none, and how long it took."""

    losses: list[float]
    seconds: float


def command_of(script: Script, how: str, recipe: str, folder: Path) -> list[str]:
    """Return the command for 2 processes."""
    start = [sys.executable] if script.starts_itself else ["torchrun", "--standalone", "--nproc_per_node", "2"]
    if how == "run module":
        start += ["-m", "distnorm.run", "--recipe", recipe]
    elif how == "distnorm launch":
        config = table.accelerate_yaml("MULTI_CPU", section=True)(folder, recipe)
        start = ["distnorm", "launch", "--config_file", str(config)]
    return [*start, *script.command, *script.arguments]


def run(command: Sequence[str], data: Path) -> Outcome:
    """Run a job on the pictures in ``data``.

    Raises:
        RuntimeError: it failed.
    """
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("DISTNORM_")}
    environment = {
        **inherited,
        "PATH": f"{BIN}{os.pathsep}{inherited['PATH']}",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests" / "models" / "at_start", ZOO))),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "HF_HOME": str(data.parent),
        "HF_HUB_OFFLINE": "1",
    }
    begun = time.perf_counter()
    words = [each.format(data=data) for each in command]
    job = subprocess.run(words, cwd=data.parent, env=environment, capture_output=True, text=True, timeout=300)
    seconds = time.perf_counter() - begun
    if job.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{job.stdout}\n{job.stderr}")
    results = [line.removeprefix("RESULT ") for line in job.stdout.splitlines() if line.startswith("RESULT ")]
    return Outcome(losses=json.loads(results[-1])["losses"] if results else [], seconds=seconds)


def joined(script: Script, data: Path) -> list[float] | None:
    """Return the losses of one stock process on the joined batches; None if the script has no such batches."""
    if not script.joined:
        return None
    start = [sys.executable] if script.starts_itself else ["torchrun", "--standalone", "--nproc_per_node", "1"]
    return run([*start, *script.command, *script.arguments, *script.joined], data).losses


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest between losses, relative to the larger one."""
    return max(abs(mine - theirs) / max(abs(mine), abs(theirs)) for mine, theirs in zip(one, other, strict=True))


def line(script: Script, how: str, recipe: str, found: Outcome, reference: list[float] | None) -> str:
    """A line of the table."""
    exact = reference is not None and recipe != MOVING
    cells = [
        f"`{script.name}`",
        how,
        f"`{recipe}`" if recipe else "",
        f"{found.losses[-1]:.4f}" if found.losses else "passes",
        f"{difference(found.losses, reference or ()):.0e}" if exact else "",
        f"{found.seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Run all rows, and write them into the page."""
    lines = [
        f"2 cores, Intel Xeon, x86-64, virtual, {date.today()}, `make scripts`:",
        "",
        "| script | how | recipe | last value | difference from the joined batch | seconds |",
        "|---|---|---|---:|---:|---:|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        pictures.write(data)
        for script in SCRIPTS:
            reference = joined(script, data)
            for how, recipe in WAYS:
                if how == "distnorm launch" and script.starts_itself:
                    continue
                found = run(command_of(script, how, recipe, Path(folder)), data)
                lines.append(line(script, how, recipe, found, reference))
                print(lines[-1], flush=True)
    before, _, after = table._between(PAGE.read_text(), NAME)
    PAGE.write_text("\n".join([before, *lines, after]))


if __name__ == "__main__":
    main()
