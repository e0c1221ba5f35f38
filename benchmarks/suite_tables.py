"""The tables of docs/performance.md, from what ``benchmarks/suite.py`` measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))

import exchange
import goals
import growth
import joint
import layer
import methods
import moving
import plan_check
import step
import tails
import tiny
from generate import filled

from distnorm.diagnostics.draw import to_file

Record = Mapping[str, Any]
Results = Sequence[Mapping[str, Any]]

PICTURE = "growth.png"


def _step(results: Results) -> list[str]:
    return step.table(results[0]["ms"])


def _tails(results: Results) -> list[str]:
    return [*tails.table(results[0]["cases"]), "", *step.table(results[1]["ms"])]


def _moving(results: Results) -> list[str]:
    return [*moving.table(results), "", *moving.weights_table(results)]


def _growth(results: Results) -> list[str]:
    return [*growth.table(results), "", f"![Exposed communication along each axis]({PICTURE})"]


TABLES: dict[str, Callable[[Results], list[str]]] = {
    "layer": lambda results: layer.table(results[0]["cases"]),
    "tiny": tiny.table,
    "methods": methods.table,
    "tails": _tails,
    "exchange": exchange.table,
    "step-32": _step,
    "step-64": _step,
    "mpi": _step,
    "hosts-16": _step,
    "hosts-32": _step,
    "moving": _moving,
    "growth": _growth,
    "joint": joint.table,
    "plan": plan_check.table,
}


def section(part: str, record: Record | None) -> list[str]:
    """What stands between the markers of ``part``."""
    if record is None:
        return ["not measured yet"]
    missing = [f"Not run: {record['not_run']}."] if record["not_run"] else []
    if not record["results"]:
        return missing
    caption = (
        f"{record['date']}, {record['machine']}, torch {record['torch']}, load average at the start {record['load']}:"
    )
    commands = ["```text", *record["commands"], "```"]
    lines = [caption, "", *commands, "", *TABLES[part](record["results"])]
    return [*lines, "", *missing] if missing else lines


def page_of(text: str, records: Mapping[str, Record]) -> str:
    """The page ``text`` with all of its tables written anew."""
    text = filled(text, "goals", goals.table(records))
    for part in TABLES:
        text = filled(text, part, section(part, records.get(part)))
    return text


def write(page: Path, records: Mapping[str, Record]) -> None:
    """Rewrite ``page``, and draw its picture beside it."""
    page.write_text(page_of(page.read_text(), records))
    if "growth" in records and records["growth"]["results"]:
        to_file(growth.draw, records["growth"]["results"], page.with_name(PICTURE))
