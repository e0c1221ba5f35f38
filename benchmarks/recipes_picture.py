"""Draw docs/recipes.svg, the README's picture, from figures that the repository holds.

Run ``python benchmarks/recipes_picture.py``; ``--check`` fails if the file is out of date. Times are those of
docs/performance.jsonl: parts hosts-32 and moving for exposed communication, hosts-16 for whole steps. Accuracies are
those of the tables in docs/moving.md and docs/quality.md.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import suite
from measure import difference, milliseconds

DOCS = Path(__file__).parent.parent / "docs"
PICTURE = DOCS / "recipes.svg"
BLUE, ORANGE, GREY = "#1f5fa8", "#c8590a", "#777777"
CENTRALIZED = "(weights='centralized')"
SHOWN = {"gather": "gather, as torch's SyncBatchNorm", "naive": "naive: four all_reduces"}
PLACES = {"right": (10, 4, "start"), "left": (-10, 4, "end"), "below": (-5, 20, "start")}


class Point(NamedTuple):
    """A contender: where it stands, and where its name is written beside it."""

    name: str
    exposed: float
    accuracy: float
    half: float
    moving: bool
    hollow: bool
    place: str


def main() -> int:
    """Write the picture, or compare it with what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the picture is out of date")
    drawn = picture(suite.read(suite.RESULTS))
    if parser.parse_args().check:
        return int(PICTURE.read_text() != drawn)
    PICTURE.write_text(drawn)
    return 0


def picture(records: Mapping[str, Any]) -> str:
    """The whole file."""
    exposed = exposed_of(records)
    images = accuracies((DOCS / "moving.md").read_text(), "accuracy", {})
    digits = accuracies((DOCS / "quality.md").read_text(), "batch 2", {"after": "<!-- accuracy-2:begin -->"})
    natural = [
        Point("lazy_bn", exposed["lazy_bn"], *images["lazy_bn"], True, False, "right"),
        Point("sync_bn", exposed["sync_bn"], *images[f"sync_bn{CENTRALIZED}"], False, False, "left"),
        Point("local_bn", 0, *images[f"local_bn{CENTRALIZED}"], False, False, "right"),
    ]
    scanners = [
        Point("mabn", exposed["mabn"], *digits["mabn"], True, False, "right"),
        Point("sync_bn", exposed["sync_bn"], *digits[f"sync_bn{CENTRALIZED}"], False, False, "left"),
        Point("sync_bn", exposed["sync_bn"], *digits["sync_bn"], False, True, "left"),
        Point("local_bn", 0, *digits[f"local_bn{CENTRALIZED}"], False, False, "below"),
        Point("local_bn", 0, *digits["local_bn"], False, True, "right"),
    ]
    hosts = records["hosts-16"]["results"][0]["ms"]
    parts = [
        *panel(40, "Natural images: accuracy (%)", natural, (50, 60), 2),
        *panel(320, "Digits, two scanners: accuracy (%)", scanners, (65, 95), 5),
        *bars(610, "Step of 4 hosts, 1 ms apart (ms)", hosts),
        *legend(),
    ]
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="300" viewBox="0 0 900 300" '
        'font-family="sans-serif" font-size="12" fill="#222">'
    )
    title = "<title>Accuracy against exposed communication, and step time of 4 hosts</title>"
    return "\n".join([head, title, '<rect width="900" height="300" fill="#fff"/>', *parts, "</svg>"]) + "\n"


def exposed_of(records: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds that sharing adds to a step of 4 hosts, 1 ms apart, at width 32."""
    exact = records["hosts-32"]["results"][0]["ms"]
    found = {"sync_bn": statistics.median(difference(exact["sync_bn"], exact["local_bn"]))}
    for result in records["moving"]["results"]:
        if (result["ranks"], result.get("delay_ms")) == (4, 1):
            for name in ("mabn", "lazy_bn"):
                times = result["ms"]
                apart = difference(times[f"{name}, projected"], times[f"{name}, projected, Local"])
                found[name] = statistics.median(apart)
    return found


def accuracies(page: str, column: str, options: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """By contender, mean and half of its interval: the first table of ``page`` with ``column``."""
    lines = iter(page.partition(options.get("after", ""))[2].splitlines() if options else page.splitlines())
    place = next(cells.index(column) for cells in map(cells_of, lines) if "contender" in cells and column in cells)
    next(lines)
    found = {}
    for cells in map(cells_of, lines):
        if len(cells) <= place:
            break
        mean, half = re.fullmatch(r"(\S+) ± (\S+)", cells[place]).groups()  # type: ignore[union-attr]
        found[cells[0].strip("`")] = (float(mean), float(half))
    return found


def cells_of(line: str) -> list[str]:
    """The cells of a table's line."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def panel(left: int, title: str, points: Sequence[Point], span: tuple[int, int], tick: int) -> Iterator[str]:
    """Accuracy against exposed communication, from 0 to 90 ms."""
    low, high = span

    def across(value: float) -> float:
        return left + 12 + value * 205 / 90

    def up(value: float) -> float:
        return 220 - (value - low) * 170 / (high - low)

    yield f'<text x="{left - 12}" y="24" font-weight="bold">{title}</text>'
    for value in range(low, high + 1, tick):
        yield f'<path d="M{left} {up(value):.0f}h220" stroke="#ddd"/>'
        yield f'<text x="{left - 5}" y="{up(value) + 4:.0f}" text-anchor="end">{value}</text>'
    for value in (0, 30, 60, 90):
        yield f'<text x="{across(value):.0f}" y="238" text-anchor="middle">{value}</text>'
    yield f'<text x="{left + 110}" y="256" text-anchor="middle">exposed communication (ms per step)</text>'
    for point in points:
        x, y, colour = across(point.exposed), up(point.accuracy), ORANGE if point.moving else BLUE
        ends = [up(point.accuracy - point.half), up(point.accuracy + point.half)]
        yield f'<path d="M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}" stroke="{colour}" stroke-width="1.5"/>'
        fill = "#fff" if point.hollow else colour
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2"/>'
        side, down, anchor = PLACES[point.place]
        yield f'<text x="{x + side:.0f}" y="{y + down:.0f}" text-anchor="{anchor}" fill="{colour}">{point.name}</text>'


def bars(left: int, title: str, times: Mapping[str, Sequence[float]]) -> Iterator[str]:
    """A whole step, by contender."""
    yield f'<text x="{left}" y="24" font-weight="bold">{title}</text>'
    names = ("stock", "local_bn", "sync_bn", "gather", "naive")
    widest = statistics.median(times["naive"])
    for row, name in enumerate(names):
        y, colour = 42 + 37 * row, GREY if name in ("stock", *SHOWN) else BLUE
        width = 225 * statistics.median(times[name]) / widest
        yield f'<text x="{left}" y="{y + 8}" fill="{colour}">{SHOWN.get(name, name)}</text>'
        yield f'<rect x="{left}" y="{y + 13}" width="{width:.1f}" height="12" fill="{colour}"/>'
        yield f'<text x="{left + width + 5:.0f}" y="{y + 23}">{milliseconds(times[name])}</text>'


def legend() -> Iterator[str]:
    """What the marks mean."""
    marks = [
        (40, BLUE, BLUE, "exact, or local"),
        (165, ORANGE, ORANGE, "moving: one asynchronous collective per step"),
        (455, "#fff", BLUE, "weights not centred (all others: centred)"),
    ]
    for x, fill, colour, text in marks:
        yield f'<circle cx="{x}" cy="281" r="5" fill="{fill}" stroke="{colour}" stroke-width="2"/>'
        yield f'<text x="{x + 10}" y="285">{text}</text>'


if __name__ == "__main__":
    sys.exit(main())
