"""Units of work that cannot hurt each other: each in a forked process of its own, with a limit, and on disk at once.

The parent imports torch once and never touches the card, so that forks start in no time and with a fresh CUDA context:
an error of the card, an abort or a hang ends its unit alone. What a unit finds is one line of JSON per part, written as
soon as the part ends. Whoever is killed leaves Python's stacks and the end of his output.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch

RESULTS, OUTPUT = "results.jsonl", "log.txt"
WHOLE, ENDED = "(all)", "(ended)"
"""The part that a unit is, besides its own ones; and the record of a stage that ran to its end."""

TAIL = 6000
"""Characters of a dead unit's output that its record keeps; ``log.txt`` has all of it."""


class NotRunError(Exception):
    """A part that cannot run here; the text says why."""


@dataclass(frozen=True)
class Log:
    """Where a unit writes, and where it runs: ``card`` is None on a machine without one, where everything is tiny."""

    folder: Path
    card: str | None
    stage: str = ""
    unit: str = ""

    @property
    def device(self) -> str:
        """Of tensors."""
        return "cpu" if self.card is None else "cuda"

    def synchronize(self) -> None:
        """Wait for the card: its errors belong to the part that made them."""
        if self.card is not None:
            torch.cuda.synchronize()

    def need_card(self) -> None:
        """End this part where there is none."""
        if self.card is None:
            raise NotRunError("no card")

    def write(self, part: str, state: str, **found: Any) -> None:
        """One record, on disk when this returns. Several processes may write at the same time."""
        where = {"stage": self.stage, "unit": self.unit, "part": part, "state": state, "card": self.card}
        line = json.dumps({**where, "at": round(time.time(), 1), **found}) + "\n"
        file = os.open(self.folder / RESULTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line.encode())
            os.fsync(file)
        finally:
            os.close(file)

    @contextmanager
    def part(self, name: str) -> Iterator[dict[str, Any]]:
        """A piece of work that puts what it finds into the mapping; an error is written down, and the unit goes on."""
        began, found = time.perf_counter(), dict[str, Any]()
        state = "ok"
        try:
            yield found
            self.synchronize()
        except NotRunError as reason:
            state, found["reason"] = "not run", str(reason)
        except Exception:  # whatever it is, it is a finding
            state, found["error"] = "failed", traceback.format_exc()
        self.write(name, state, seconds=round(time.perf_counter() - began, 3), **found)


def records(folder: Path) -> list[dict[str, Any]]:
    """The newest record of every part, in the order in which parts were first met."""
    path = folder / RESULTS
    lines = path.read_text().splitlines() if path.exists() else []
    found: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in lines:
        record = json.loads(line)
        found[record["stage"], record["unit"], record["part"]] = record
    return list(found.values())


Unit = Callable[[Log], None]


@dataclass(frozen=True)
class Phase:
    """Units of one kind: so many at a time, which share the cores, and each for so many seconds at most."""

    units: dict[str, Unit]
    width: int = 1
    limit: float = 60.0


@dataclass
class _Running:
    log: Log
    until: float
    seconds: float
    threads: int
    output: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    process: int = 0


def run(phase: Phase, log: Log, deadline: float, each: Callable[[], None]) -> None:
    """Run all units of ``phase``, none beyond ``deadline`` on ``time.monotonic``'s clock; ``each`` after every one."""
    waiting, running = list(phase.units.items()), list[_Running]()
    try:
        while waiting or running:
            while waiting and len(running) < phase.width:
                name, unit = waiting.pop(0)
                running += _start(unit, replace(log, unit=name), phase, deadline)
            time.sleep(0.02)
            for one in [one for one in running if _ended(one)]:
                running.remove(one)
                each()
    finally:
        for one in running:
            _kill(one)


def _start(unit: Unit, log: Log, phase: Phase, deadline: float) -> list[_Running]:
    seconds = min(phase.limit, deadline - time.monotonic())
    if seconds < 1:
        log.write(WHOLE, "not run", reason="no time left")
        return []
    sys.stdout.flush()
    sys.stderr.flush()
    one = _Running(log, time.monotonic() + seconds, seconds, max((os.cpu_count() or 1) // phase.width, 1))
    one.process = os.fork()
    if not one.process:
        _child(unit, one)
    return [one]


def _child(unit: Unit, one: _Running) -> None:
    status = 1
    try:
        os.setsid()  # what it starts ends with it
        for stream in (1, 2):
            os.dup2(one.output.fileno(), stream)
        faulthandler.enable(file=2)
        faulthandler.dump_traceback_later(max(one.seconds - 1, 0.5), file=2)
        torch.set_num_threads(one.threads)
        with one.log.part(WHOLE):
            unit(one.log)
        sys.stdout.flush()
        sys.stderr.flush()
        status = 0
    finally:
        os._exit(status)  # neither NCCL's nor CUDA's own end, which may hang


def _ended(one: _Running) -> bool:
    """Whether the process is gone, by itself or by its limit: its output is kept, and a bad end is written down."""
    process, status = os.waitpid(one.process, os.WNOHANG)
    late = time.monotonic() > one.until
    if not process and not late:
        return False
    _kill(one)
    one.output.seek(0)
    text = one.output.read().decode(errors="replace")
    with (one.log.folder / OUTPUT).open("a") as file:
        file.write(f"--- {one.log.stage} {one.log.unit}\n{text}")
    if late and not process:
        reason = f"killed after {one.seconds:.0f} s"
    elif status:
        reason = f"ended with status {os.waitstatus_to_exitcode(status)}"
    else:
        return True
    one.log.write(WHOLE, "failed", error=f"{text[-TAIL:]}\n{reason}, after this output")
    return True


def _kill(one: _Running) -> None:
    """The process, and whatever it has started."""
    with suppress(ProcessLookupError):
        os.killpg(one.process, signal.SIGKILL)
