"""Measure every figure of docs/performance.md and write its tables: ``make bench``.

Run ``python benchmarks/suite.py``; ``--only PART`` measures one part anew, ``--tables-only`` nothing. Rounds are
counted and limited in time, so that all parts together stay below 15 minutes on 2 cores. What was measured is in
docs/performance.jsonl, one line per part. Parts between several hosts need root: see ``benchmarks/hosts.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import IO, Any

import hosts
import suite_tables
import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "performance.jsonl"
PAGE = RESULTS.with_suffix(".md")
PATIENCE = 300  # seconds that one command may take
SMOKE = {"runs": 2, "warmup": 2, "limit": 0, "width": 4, "widths": [4], "batch": 2, "seconds": 0.5}


@dataclass(frozen=True)
class Job:
    """One benchmark on so many ranks: of this machine, of as many hosts where there is a delay, or under mpirun."""

    script: str
    ranks: int
    options: dict[str, Any] = field(default_factory=dict)
    delay_ms: float | None = None
    mpi: bool = False

    def command(self) -> list[str]:
        """How it is run."""
        words = [f"benchmarks/{self.script}.py"]
        for name, value in self.options.items():
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        if self.mpi:
            return ["launch/mpirun.sh", str(self.ranks), *words]
        if self.delay_ms is not None:
            return ["python", "benchmarks/hosts.py", str(self.ranks), f"{self.delay_ms:g}", "python", *words]
        if self.ranks == 1:
            return ["python", *words]
        return ["torchrun", "--standalone", "--nproc_per_node", str(self.ranks), *words]

    def small(self) -> Job:
        """The same in seconds, to see that it runs."""
        options = {name: SMOKE.get(name, value) for name, value in self.options.items()}
        if "points" in options:
            options["points"] = ["2,16", "3,16"]
        delay_ms = None if self.delay_ms is None else 0.2
        return replace(self, ranks=min(self.ranks, 2), delay_ms=delay_ms, options=options)


def counted(runs: int, limit: float, warmup: int = 3, **options: Any) -> dict[str, Any]:
    """Options of a benchmark: how often and how long it measures, and its own."""
    return options | {"warmup": warmup, "runs": runs, "limit": limit}


PEERS = ["stock", "local_bn", "sync_bn", "gather", "naive"]
OVERLAP = "sync_bn(overlap=True)"
MPI = ["stock", "local_bn", "sync_bn", "gloo:sync_bn", "mpi:sync_bn"]
TAILS = ["stock", "local_bn", "fused:local_bn", "sync_bn", "fused:sync_bn"]
FORMS = {"weights": ["none", "forward", "projected"]}
PROJECTED = counted(30, 16, warmup=4, weights=["projected"], width=32, batch=16)
LINE = [f"{layers},64" for layers in (10, 40, 160)] + [f"40,{channels}" for channels in (16, 512, 2048)]
BASE = counted(8, 5, warmup=2, points=["40,64"])

PARTS: dict[str, list[Job]] = {
    "layer": [Job("layer", 1, counted(40, 6, batch=16, widths=[32, 64]))],
    "tiny": [Job("tiny", ranks, counted(40, 8)) for ranks in (1, 2)],
    "methods": [Job("methods", 2, counted(12, 60))],
    "tails": [
        Job("tails", 1, counted(20, 3, batch=16, widths=[32, 64])),
        Job("step", 2, counted(30, 25, width=32, batch=16, contenders=TAILS)),
    ],
    "exchange": [Job("exchange", ranks, counted(20, 1)) for ranks in (2, 4, 8)],
    "step-32": [Job("step", 2, counted(30, 44, width=32, batch=16, contenders=[*PEERS, "none", OVERLAP]))],
    "step-64": [Job("step", 2, counted(25, 48, width=64, batch=16, contenders=PEERS))],
    "mpi": [Job("step", 2, counted(40, 42, width=32, batch=16, contenders=MPI), mpi=True)],
    "hosts-16": [Job("step", 4, counted(20, 36, width=16, batch=4, contenders=[*PEERS, OVERLAP]), delay_ms=1)],
    "hosts-32": [Job("step", 4, counted(20, 38, width=32, batch=4, contenders=PEERS), delay_ms=1)],
    "moving": [
        Job("moving", 2, counted(30, 20, warmup=5, width=16, batch=4) | FORMS),
        Job("moving", 2, counted(30, 32, warmup=4, width=32, batch=16) | FORMS),
        *(Job("moving", 2, PROJECTED, delay_ms=delay) for delay in (0.2, 1)),
        Job("moving", 4, PROJECTED),
        *(Job("moving", 4, PROJECTED, delay_ms=delay) for delay in (0.2, 1)),
    ],
    "growth": [
        Job("growth", 2, BASE | {"points": LINE}, delay_ms=0.2),
        *(Job("growth", ranks, BASE, delay_ms=0.2) for ranks in (4, 8)),
        *(Job("growth", 2, BASE, delay_ms=delay) for delay in (0, 1, 2)),
    ],
    "joint": [
        Job("joint", 2, counted(20, 14, model="resnet18", width=32, batch=16)),
        Job("joint", 2, counted(20, 14, model="resnet50", width=16, batch=16)),
        Job("joint", 4, counted(15, 12, model="resnet18", width=16, batch=4), delay_ms=1),
        Job("joint", 4, counted(15, 18, model="resnet50", width=16, batch=4), delay_ms=1),
    ],
    "plan": [
        Job("plan_check", 2, {"seconds": 12, "width": 16, "batch": 4}, delay_ms=delay) for delay in (None, 0.2, 1)
    ],
}


def measure(jobs: list[Job], load: float) -> dict[str, Any]:
    """Run ``jobs``; what they found, when and where.

    Raises:
        RuntimeError: one failed, or took too long.
    """
    results: list[dict[str, Any]] = []
    commands: list[str] = []
    reason = None
    for job in jobs:
        if job.delay_ms is not None and (why_not := no_hosts()):
            reason = why_not
            continue
        results.append(outcome(job))
        commands.append(shlex.join(job.command()))
    record = {"date": str(date.today()), "machine": machine(), "torch": torch.__version__, "load": round(load, 2)}
    return record | {"commands": commands, "not_run": reason, "results": results}


def outcome(job: Job) -> dict[str, Any]:
    """Run one benchmark; its result, and the delay between its hosts."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "result.json", Path(folder) / "errors"
        with errors.open("w") as sink:
            status = execute([*job.command(), "--json", str(out)], sink)
        if status != 0:
            told = errors.read_text()[-4000:]
            how = f"took more than {PATIENCE} s" if status is None else f"ended with {status}"
            raise RuntimeError(f"{shlex.join(job.command())} {how}:\n{told}")
        result: dict[str, Any] = json.loads(out.read_text())
    return result if job.delay_ms is None else {"delay_ms": job.delay_ms, **result}


def execute(words: list[str], errors: IO[str]) -> int | None:
    """Run a command in the root of the repository; its exit status, None where it took too long."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # A session of its own: a job that hangs is ended with all of its ranks.
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True
    )
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


@cache
def no_hosts() -> str | None:
    """Why there is no network between hosts."""
    return hosts.why_not()


def machine() -> str:
    """Cores and processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores, {names[0] if names else platform.processor()}, {platform.machine()}"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """Stored records by part."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record.pop("part"): record for record in map(json.loads, lines)}


def write(records: dict[str, dict[str, Any]], path: Path) -> None:
    """Store records, in the order of the parts."""
    lines = [json.dumps({"part": name} | records[name], separators=(",", ":")) for name in PARTS if name in records]
    path.write_text("".join(f"{line}\n" for line in lines))


def shrunk(jobs: list[Job]) -> list[Job]:
    """Jobs that take seconds, each once."""
    small: list[Job] = []
    for job in jobs:
        if job.small() not in small:
            small.append(job.small())
    return small


def main() -> int:
    """Measure parts, store what was found after each, and write the tables."""
    parser = argparse.ArgumentParser(description="Measure the figures of docs/performance.md and write its tables.")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="measure these parts; the rest stays as stored")
    parser.add_argument("--tables-only", action="store_true", help="measure nothing")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny sizes: whether everything runs, in a page of its own"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    if options.smoke and (options.page == PAGE or options.results == RESULTS):
        parser.error("--smoke would overwrite measured figures: give it a --page and --results of its own.")
    load, started = os.getloadavg()[0], time.perf_counter()
    records = read(options.results)
    failed = False
    for part in [] if options.tables_only else options.only or PARTS:
        try:
            records[part] = measure(shrunk(PARTS[part]) if options.smoke else PARTS[part], load)
            write(records, options.results)
            how = f"in part not run: {reason}" if (reason := records[part]["not_run"]) else "done"
        except RuntimeError as error:
            how, failed = f"failed, and stays as stored: {error}", True
        print(f"{time.perf_counter() - started:4.0f} s  {part}: {how}", file=sys.stderr, flush=True)
    suite_tables.write(options.page, records)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
