"""Write the tables of docs/quality.md from the runs of benchmarks/quality.py.

python benchmarks/quality_report.py
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

from scipy import stats

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))

from generate import filled
from measure import markdown
from quality import BATCHES, CONTENDERS, DIFFICULTIES, RESULTS, SEEDS, Cell, rates, tuning
from study import read_results

PAGE = RESULTS.with_suffix(".md")
CONFIDENCE = 0.95
GOAL = 0.5  # points that mabn may lie below sync_bn

PAIRS = (
    ("mabn", "sync_bn"),
    ("mabn", "sync_bn(weights='centralized')"),
    ("mabn", "mabn(weights='none')"),
    ("mabn(weights='none')", "sync_bn"),
    ("mabn", "hierarchical_mabn"),
    ("mabn", "group_norm"),
    ("lazy_bn(window=1)", "sync_bn"),
    ("lazy_bn(window=1)", "sync_bn(weights='centralized')"),
    ("lazy_bn(window=1)", "lazy_bn(window=1, weights='none')"),
    ("lazy_bn(window=1, weights='none')", "sync_bn"),
    ("local_bn", "sync_bn"),
    ("local_bn", "stock"),
    ("local_bn(weights='centralized')", "sync_bn(weights='centralized')"),
    ("sync_bn(weights='centralized')", "sync_bn"),
)

Accuracies = Mapping[Cell, float]


class Interval(NamedTuple):
    """A mean and half the length of its confidence interval; NaN where there are fewer than two values."""

    mean: float
    half: float


def interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean."""
    count = len(values)
    if count < 2:
        return Interval(values[0] if values else math.nan, math.nan)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Interval(fmean(values), quantile * stdev(values) / math.sqrt(count))


def difference(accuracies: Accuracies, level: int, batch: int, one: str, other: str) -> Interval:
    """Points by which ``one`` lies above ``other``, paired by seed."""
    seeds = complete(accuracies, level, batch)
    cells = [(Cell(level, batch, one, seed), Cell(level, batch, other, seed)) for seed in seeds]
    return interval([accuracies[first] - accuracies[second] for first, second in cells])


def complete(accuracies: Accuracies, level: int, batch: int) -> list[int]:
    """Seeds of which every contender was run."""
    return [s for s in SEEDS if all(Cell(level, batch, contender, s) in accuracies for contender in CONTENDERS)]


def accuracy_rows(accuracies: Accuracies, level: int) -> list[str]:
    """Mean accuracy of each contender at each batch size."""

    def at(contender: str, batch: int) -> str:
        seeds = complete(accuracies, level, batch)
        return written(interval([accuracies[Cell(level, batch, contender, seed)] for seed in seeds]))

    batches = sorted(BATCHES)
    rows = [[f"`{each}`", *(at(each, batch) for batch in batches)] for each in CONTENDERS]
    return markdown(["contender", *headings(accuracies, level)], rows)


def pair_rows(accuracies: Accuracies, level: int) -> list[str]:
    """Paired differences at each batch size; in bold where the interval leaves out 0."""

    def at(pair: tuple[str, str], batch: int) -> str:
        found = difference(accuracies, level, batch, *pair)
        text = written(found, sign="+")
        return f"**{text}**" if abs(found.mean) > found.half else text

    rows = [[f"`{one}` − `{other}`", *(at((one, other), batch) for batch in sorted(BATCHES))] for one, other in PAIRS]
    return markdown(["difference", *headings(accuracies, level)], rows)


def headings(accuracies: Accuracies, level: int) -> list[str]:
    """Batch sizes, with the number of seeds where some are still missing."""
    counts = {batch: len(complete(accuracies, level, batch)) for batch in sorted(BATCHES)}
    return [f"batch {batch}" + (f" ({n} seeds)" if n < len(SEEDS) else "") for batch, n in counts.items()]


def goal_rows(accuracies: Accuracies) -> list[str]:
    """Whether ``mabn`` keeps up with ``sync_bn`` at batch 2, and whether that is worth something."""
    rows = []
    for level in DIFFICULTIES:
        ours = difference(accuracies, level, 2, "mabn", "sync_bn")
        stretch = difference(accuracies, level, 2, "mabn", "sync_bn(weights='centralized')")
        local = difference(accuracies, level, 2, "local_bn", "sync_bn")
        verdicts = [
            verdict(ours.mean - ours.half >= -GOAL, ours.mean + ours.half < -GOAL),
            verdict(stretch.mean - stretch.half >= -GOAL, stretch.mean + stretch.half < -GOAL),
            verdict(local.mean + local.half < 0, local.mean - local.half >= 0),
        ]
        intervals = [written(each, sign="+") for each in (ours, stretch, local)]
        cells = [f"{text}: {word}" for text, word in zip(intervals, verdicts, strict=True)]
        rows.append([str(level), *cells])
    titles = ["`mabn` − `sync_bn`", "`mabn` − `sync_bn(weights='centralized')`", "`local_bn` − `sync_bn`"]
    return markdown(["difficulty", *titles], rows)


def verdict(holds: bool, fails: bool) -> str:
    """What an interval says of a claim."""
    return "yes" if holds else "no" if fails else "open"


def rate_rows(accuracies: Accuracies) -> list[str]:
    """Mean accuracy at each learning rate."""
    cells = rates()
    columns = sorted({cell.rate for cell in cells})
    keys = dict.fromkeys((cell.difficulty, cell.contender) for cell in cells)
    rows = []
    for level, contender in keys:
        here = [cell for cell in cells if (cell.difficulty, cell.contender) == (level, contender)]
        found = [mean_of(accuracies, [cell for cell in here if cell.rate == rate]) for rate in columns]
        rows.append([str(level), f"`{contender}`", *found])
    return markdown(["difficulty", "contender", *(f"{rate:g}" for rate in columns)], rows)


def tuning_rows(accuracies: Accuracies) -> list[str]:
    """Mean accuracy of each setting of ``mabn``."""
    cells = tuning()
    settings = dict.fromkeys(cell.contender for cell in cells)
    rows = [[f"`{name}`", mean_of(accuracies, [cell for cell in cells if cell.contender == name])] for name in settings]
    return markdown(["setting", "accuracy"], rows)


def mean_of(accuracies: Accuracies, cells: Sequence[Cell]) -> str:
    """The mean over ``cells``, once all are there."""
    if any(cell not in accuracies for cell in cells):
        return "not run"
    return written(interval([accuracies[cell] for cell in cells]))


def written(value: Interval, sign: str = "") -> str:
    """An interval as the page shows it."""
    if math.isnan(value.mean):
        return "not run"
    mean = f"{value.mean:{sign}.1f}".replace("-", "−")
    return mean if math.isnan(value.half) else f"{mean} ± {value.half:.1f}"


def page_of(text: str, accuracies: Accuracies) -> str:
    """The page ``text`` with all of its tables written anew."""
    parts = {"goal": goal_rows(accuracies), "rates": rate_rows(accuracies), "tuning": tuning_rows(accuracies)}
    for level in DIFFICULTIES:
        parts[f"accuracy-{level}"] = accuracy_rows(accuracies, level)
        parts[f"pairs-{level}"] = pair_rows(accuracies, level)
    for name, rows in parts.items():
        text = filled(text, name, rows)
    return text


def main() -> None:
    """Rewrite the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    accuracies = {cell: entry["accuracy"] for cell, entry in read_results(options.results, Cell)}
    options.page.write_text(page_of(options.page.read_text(), accuracies))


if __name__ == "__main__":
    main()
