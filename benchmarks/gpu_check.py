"""Everything that a card shall tell, the most important first: for one that is lent for 15 minutes.

``python benchmarks/gpu_check.py --out out/gpu --stages abcd --limit 230``, with torch and Triton and nothing else.
Stages are letters; without ``--stages`` those run that FOLDER lacks. Each has a limit, and each piece of it a process
of its own, so that an error, an abort or a hang takes nothing else along. FOLDER holds ``results.jsonl``, written piece
by piece, ``report.md``, written anew after each, ``log.txt`` with all output, and ``profile.txt``. Records are added:
of a piece that ran twice the newest one counts. Without a card all of it runs in a tiny form, in Triton's interpreter,
and says what it cannot tell.
"""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(1, str(ROOT))  # the package and its tests, as they lie here

from gpu_units import ENDED, Log, Phase, records, run  # noqa: E402


class Stage(NamedTuple):
    """Phases, one after another, for so many seconds at most."""

    phases: Callable[[bool], list[Phase]]
    limit: float

    @property
    def title(self) -> str:
        """What it does, in a line."""
        return (self.phases.__doc__ or "").strip().rstrip(".")


def stages() -> dict[str, Stage]:
    """All of them. Imports Triton, which decides then whether to interpret."""
    from gpu_stages_device import stage_d, stage_h
    from gpu_stages_right import stage_a, stage_b, stage_c
    from gpu_stages_speed import stage_e, stage_f, stage_g

    made = stage_a, stage_b, stage_c, stage_d, stage_e, stage_f, stage_g, stage_h
    limits = 40, 60, 60, 60, 180, 210, 60, 240
    return {letter: Stage(make, limit) for letter, make, limit in zip("abcdefgh", made, limits, strict=True)}


def card() -> str | None:
    """The card's name, asked for in another process: a process that has touched a card cannot fork."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    asking = context.Process(target=_tell, args=(sender,))
    asking.start()
    sender.close()
    try:
        found: str | None = receiver.recv()
    except EOFError:
        raise RuntimeError("the process that asked for the card has died") from None
    asking.join()
    return found


def _tell(sender: multiprocessing.connection.Connection) -> None:
    sender.send(torch.cuda.get_device_name(0) if torch.cuda.is_available() else None)


def wanted(folder: Path, named: str | None, known: Sequence[str]) -> list[str]:
    """The stages that are named; else those which have not ended."""
    if named is not None:
        unknown = sorted(set(named) - set(known))
        if unknown:
            raise SystemExit(f"--stages {named}: no stage {unknown[0]!r}; there are {''.join(known)}.")
        return list(named)
    ended = {each["stage"] for each in records(folder) if each["part"] == ENDED}
    return [letter for letter in known if letter not in ended]


def check(log: Log, letters: Sequence[str], known: dict[str, Stage], limit: float, only: str) -> bool:
    """Run the stages' units whose names ``only`` finds, and keep the report up to date; whether nothing has failed."""
    import gpu_report

    titles = {letter: stage.title for letter, stage in known.items()}
    end = time.monotonic() + limit

    def report() -> None:
        gpu_report.write(log.folder, titles)

    for letter in letters:
        stage, here = known[letter], Log(log.folder, log.card, letter)
        print(f"({letter}) {stage.title}, {end - time.monotonic():.0f} s left", flush=True)
        deadline = min(end, time.monotonic() + stage.limit)
        for phase in stage.phases(log.card is not None):
            units = {name: unit for name, unit in phase.units.items() if re.search(only, name)}
            run(replace(phase, units=units), here, deadline, report)
        if not only and time.monotonic() < deadline:
            here.write(ENDED, "ok")
    print("\n".join(gpu_report.write(log.folder, titles)))
    failed = [each for each in records(log.folder) if each["state"] == "failed"]
    for each in failed:
        print(f"failed: ({each['stage']}) {each['unit']}, {each['part']}: {each['error'].strip().splitlines()[-1]}")
    return not failed


def main(arguments: Sequence[str] | None = None) -> None:
    """Check what is asked for."""
    parser = argparse.ArgumentParser(description="Check and time norms on an NVIDIA card.")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", metavar="FOLDER", help="for results")
    parser.add_argument("--stages", help="letters from a to h, in any order; by default those that FOLDER lacks")
    parser.add_argument("--only", default="", metavar="REGEX", help="the units whose names it finds")
    parser.add_argument("--limit", type=float, default=600, help="seconds, the start of Python left out")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # what runs ends, too
    options.out.mkdir(parents=True, exist_ok=True)
    name = card()
    if name is None:
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    known = stages()
    letters = wanted(options.out, options.stages, list(known))
    sys.exit(not check(Log(options.out, name), letters, known, options.limit, options.only))


if __name__ == "__main__":
    main()
