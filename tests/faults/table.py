"""``python -m tests.faults.table`` (``make test-faults``): all rows of the fault table, and docs/faults.md with them;
``--only PART`` for one part of it.

Exits with 1 where something is not as it must be; the page says so, too.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch

from tests.faults import apart
from tests.faults.faults import FAULTS, RECIPES, Fault
from tests.faults.judge import Judged
from tests.faults.runner import Runner

PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
PARTS = {
    "one-host": [each for each in FAULTS if not each.apart],
    "between-hosts": [each for each in FAULTS if each.apart],
}
LEFT_OUT = "Left out on the machine that wrote this page: "
RUNNERS = 4
"""At a time: most rows wait."""

Key = tuple[str, str, str]
WORDS = {
    "right": "ends, with the bits of an undisturbed job",
    "alike": "ends, with running statistics equal on all ranks",
    "right or error": "the same, or an error",
    "error": "an error",
    "own": "its own exception",
    "interrupt": "KeyboardInterrupt",
    "killed": "killed",
    "gone": "exit code 0",
}


def run_all(keys: list[Key]) -> dict[Key, Judged]:
    """Run rows on several runners, and print each."""
    waiting = iter(keys)
    found: dict[Key, Judged] = {}

    def work() -> None:
        with Runner() as runner:
            for key in waiting:  # a list's iterator may be shared by threads
                found[key] = runner.run(*key)
                print(", ".join(key), "|", cell(found[key]), *found[key].wrong, flush=True)

    with ThreadPoolExecutor(RUNNERS) as threads:
        for each in [threads.submit(work) for _ in range(RUNNERS)]:
            each.result()
    return found


def cell(judged: Judged) -> str:
    """What happened, in a word: seconds to the last error."""
    if judged.wrong:
        return "**wrong**"
    seconds = [each for each in judged.seconds if each is not None]
    return f"{max(seconds):.2f} s" if seconds else "ends"


def lines(faults: Sequence[Fault], found: Mapping[Key, Judged]) -> list[str]:
    """The tables."""
    notes: list[str] = []
    recipes = [recipe for recipe in RECIPES if any(recipe in each.recipes for each in faults)]
    rows = [
        f"| fault | must happen | transport | {' | '.join(f'`{recipe}`' for recipe in recipes)} |",
        f"|---|---|---|{'---|' * len(recipes)}",
    ]
    for fault, transport in [(each, transport) for each in faults for transport in each.transports]:
        cells = []
        for recipe in recipes:
            if recipe not in fault.recipes:
                cells.append("")
                continue
            why = fault.must(transport, recipe)[-1]
            if why and why not in notes:
                notes.append(why)
            cells.append(cell(found[fault.name, transport, recipe]) + (f" ({notes.index(why) + 1})" if why else ""))
        first = transport == fault.transports[0]
        rows.append(
            f"| {fault.name if first else ''} | {demand(fault) if first else ''} | {transport} | {' | '.join(cells)} |"
        )
    said = ["| fault | rank 0 says, with `sync_bn` over the first of the transports |", "|---|---|"]
    for fault in faults:
        text = found[fault.name, fault.transports[0], "sync_bn"].texts[0]
        if text:
            said.append(f"| {fault.name} | {shortened(text)} |")
    return [*rows, "", *(f"({number}) {why}." for number, why in enumerate(notes, 1)), "", *said]


def demand(fault: Fault) -> str:
    """What must happen, in words."""
    first, second = (WORDS[each] for each in fault.ends)
    text = f"both: {first}" if first == second else f"rank 0: {first}; rank 1: {second}"
    if "error" not in fault.ends:
        return text
    return f"{text}; {'at once' if fault.within == 'soon' else f'within the timeout, {fault.timeout_s:g} s'}"


def shortened(text: str) -> str:
    """One line of a table; paths and numbers of this run do not matter."""
    text = re.sub(r"/\S*/", "…/", " ".join(text.split())).replace("|", "/").partition(" GLHF!")[0]  # gloo's farewell
    return text if len(text) < 260 else f"{text[:260].rpartition(' ')[0]} …"  # codespell reads it


def write(part: str) -> bool:
    """Run a part of the table and write it to the page; whether all is as it must be."""
    why_not = apart.why_not() if part == "between-hosts" else None
    text = [f"{LEFT_OUT}{why_not}."] if why_not else run(part)
    begin, end = markers(part)
    before, _, rest = PAGE.read_text().partition(begin)
    PAGE.write_text("\n".join([f"{before}{begin}", *text, f"{end}{rest.partition(end)[2]}"]))
    print(part, "|", text[0])
    return not any("**wrong**" in line for line in text)


def run(part: str) -> list[str]:
    """The rows of a part: where they were run, and what came of them."""
    faults, started = PARTS[part], time.monotonic()
    found = run_all([(fault.name, *key) for fault in faults for key in fault.keys])
    minutes = (time.monotonic() - started) / 60
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    where = (
        f"`python -m tests.faults.table --only {part}`, {date.today()}: {len(found)} rows in {minutes:.1f} minutes, "
        f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}, load {os.getloadavg()[2]:.0f}, "
        f"torch {torch.__version__}."
    )
    wrong = [key for key, judged in found.items() if judged.wrong]
    print(f"{len(wrong)} of {len(found)} rows are wrong: {wrong}")
    return [where, "", *lines(faults, found)]


def markers(part: str) -> tuple[str, str]:
    """Of a part of the page."""
    return f"<!-- {part}:begin -->", f"<!-- {part}:end -->"


def main() -> int:
    """Run everything, or one part, and write the page."""
    parser = argparse.ArgumentParser(description="Run rows of the fault table, and write them to docs/faults.md.")
    parser.add_argument("--only", choices=PARTS, help="this part of the page")
    only = parser.parse_args().only
    return 0 if all([write(part) for part in ([only] if only else PARTS)]) else 1


if __name__ == "__main__":
    sys.exit(main())
