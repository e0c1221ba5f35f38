"""The tables of docs/zoo.md: models of other libraries, converted, and what came of it. ``make zoo`` runs all of it.

``python -m tests.models.table``; ``--only values`` or ``--only times`` runs one stage, ``--models PATTERN`` some
models, ``--tables-only`` nothing. What was found is in docs/zoo.jsonl, a line per model. Exits with 1 where a check
failed that the stock model passes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from tests.models.zoo import LIBRARIES, PACKAGES, cases

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "zoo.jsonl"
PAGE = RESULTS.with_suffix(".md")
EXPLAINED = ("two ranks: not run", "one step", "left alone", "the stock model", "rounding")
"""How reasons begin that are no faults."""

Record = dict[str, Any]
Records = dict[str, Record]
"""By key of the case, and under names of stages how they were run."""


def read(path: Path) -> Records:
    """What is stored."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {record.pop("key"): record for record in map(json.loads, lines)}


def write(records: Records, path: Path) -> None:
    """Store it, in order of the list."""
    keys = [*STAGES, *(key for key in cases() if key in records)]
    lines = [json.dumps({"key": key} | records[key], separators=(",", ":")) for key in keys if key in records]
    path.write_text("".join(f"{line}\n" for line in lines))


STAGES = ("values", "times")


def faults(record: Record) -> list[str]:
    """Reasons of a model that are not explained."""
    return [
        reason for reason in record.get("values", {}).get("reasons", [])
        if not reason.startswith(EXPLAINED) and ": the stock model too, " not in reason
    ]  # fmt: skip


def row(key: str, record: Record) -> list[str]:
    """The cells of a model."""
    found, times = record.get("values", {}), record.get("times", {})
    number = [str(found[name]) if name in found else "" for name in ("norms", "converted", "fused")]
    apart = [f"{found[name]:.0e}" if found.get(name) is not None else "" for name in ("difference", "float32")]
    step = [f"{times[name]:.2f}" if name in times else "" for name in ("local_bn", "fused")]
    why = [*found.get("reasons", []), *(f"times: {each}" for each in times.get("reasons", []))]
    return [f"{key.partition('/')[2]}: `{record['model']}`", *number, *apart, *step, "; ".join(map(shortened, why))]


def shortened(text: str) -> str:
    """A reason for a cell."""
    text = re.sub(r"/\S*/", "…/", " ".join(text.split())).replace("|", "/").replace("<", "&lt;")
    return text if len(text) < 200 else f"{text[:200].rpartition(' ')[0]} …"


TITLES = ["model", "norms", "converted", "fused", "float64", "float32", "`local_bn` / stock", "fused / stock", "why"]


def table(library: str, records: Records) -> list[str]:
    """The rows of a library."""
    chosen = {key: record for key, record in records.items() if key.startswith(f"{library}/")}
    return markdown(TITLES, [row(key, record) for key, record in chosen.items()], {0, 8})


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], texts: set[int]) -> list[str]:
    """A table; columns but ``texts`` are numbers."""
    ruler = ["---" if at in texts else "---:" for at in range(len(titles))]
    return [f"| {' | '.join(cells)} |" for cells in (titles, ruler, *rows)]


def summary(records: Records) -> list[str]:
    """A row per library."""
    rows = []
    for library in (*LIBRARIES, ""):
        mine = [record for key, record in records.items() if "/" in key and key.startswith(library and f"{library}/")]
        found = [each["values"] for each in mine if "norms" in each.get("values", {})]
        totals = [sum(each[name] for each in found) for name in ("norms", "converted", "fused")]
        timed = [each["times"] for each in mine if "fused" in each.get("times", {})]
        ratios = [f"{median(each[name] for each in timed):.2f}" if timed else "" for name in ("local_bn", "fused")]
        right = sum(not faults(each) for each in mine)
        share = f"{100 * totals[2] / totals[0]:.0f} %" if totals[0] else ""
        rows.append([library or "all", str(len(mine)), str(right), *map(str, totals), share, *ratios])
    return markdown(["library", "models", "agree", *TITLES[1:4], "share", *TITLES[6:8]], rows, {0})


def where(stage: str, records: Records) -> str:
    """How a stage was run."""
    ran = records.get(stage)
    if ran is None:
        return f"{stage}: not run."
    seconds = [each[stage]["seconds"] for each in records.values() if stage in each]
    versions = ", ".join(f"{name} {number}" for name, number in ran["versions"].items())
    return (
        f"`python -m tests.models.table --only {stage}`, {ran['date']}: {len(seconds)} of {len(cases())} models took "
        f"{sum(seconds) / 60:.0f} minutes in all, {ran['jobs']} at a time, {ran['machine']}, load {ran['load']:.1f}; "
        f"{versions}."
    )


def page_of(text: str, records: Records) -> str:
    """The page with its tables."""
    parts = {"summary": ["", *summary(records), "", *(where(stage, records) + "\n" for stage in STAGES)]}
    parts |= {library: ["", *table(library, records), ""] for library in LIBRARIES}
    for name, lines in parts.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, _, rest = text.partition(begin)
        text = "\n".join([f"{before}{begin}", *lines, f"{end}{rest.partition(end)[2]}"])
    return text


def machine() -> str:
    """Cores and processor."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()}-core {platform.machine()}, {found[1] if found else 'unknown'}"


def run(stage: str, keys: list[str], records: Records, options: argparse.Namespace) -> None:
    """Run a stage of these models, and store what is found of each at once."""
    from tests.models import runner

    started, known = time.monotonic(), cases()

    def tell(key: str, found: Mapping[str, Any]) -> None:
        record = records.setdefault(key, {})
        record |= {"model": known[key].model, stage: rounded(found)}
        write(records, options.results)
        print(f"{time.monotonic() - started:5.0f} s  {key}: {rounded(found)}", flush=True)

    jobs = options.jobs if stage == "values" else 1  # times mean little beside other work
    runner.run(keys, stage, tell, jobs)
    ran = {"date": str(date.today()), "machine": machine(), "jobs": jobs}
    ran |= {"load": os.getloadavg()[2], "versions": {name: version(name) for name in ("torch", *PACKAGES)}}
    records[stage] = rounded(ran)
    write(records, options.results)


def rounded(found: Mapping[str, Any]) -> Record:
    """With three digits of every number."""
    return {name: float(f"{each:.3g}") if isinstance(each, float) else each for name, each in found.items()}


def main() -> int:
    """Run, and write the page."""
    parser = argparse.ArgumentParser(description="Convert models of other libraries, and write docs/zoo.md.")
    parser.add_argument("--only", choices=STAGES, help="this stage")
    parser.add_argument("--models", nargs="+", metavar="PATTERN", help="these models, such as timm/res*")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, of the stage values")
    parser.add_argument("--tables-only", action="store_true", help="run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    records = read(options.results)
    keys = [key for key in cases() if any(fnmatchcase(key, each) for each in options.models or ["*"])]
    for stage in [] if options.tables_only else [options.only] if options.only else STAGES:
        run(stage, keys, records, options)
    options.page.write_text(page_of(options.page.read_text(), read(options.results)))
    wrong = {key: faults(record) for key, record in records.items() if "/" in key and faults(record)}
    print(f"{len(wrong)} models do not agree", *(f"{key}: {each}" for key, each in wrong.items()), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
