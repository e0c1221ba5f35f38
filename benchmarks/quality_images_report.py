"""A table of the runs of benchmarks/quality_images.py, for each setting that they have in common.

python benchmarks/quality_images_report.py runs.jsonl --reference sync_bn
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from measure import markdown
from quality_images import Cell, contender_of
from quality_report import interval, written
from study import read_results

REFERENCE = "sync_bn(weights='centralized')"

Runs = Mapping[Cell, Mapping[str, Any]]


def tables(runs: Runs, reference: str) -> Iterator[str]:
    """Lines of a heading and a table for each data set, batch, number of ranks, length and learning rate."""
    for setting in dict.fromkeys(cell._replace(contender="", seed=0) for cell in runs):
        here = {cell: run for cell, run in runs.items() if cell._replace(contender="", seed=0) == setting}
        yield (
            f"{setting.data}: {setting.ranks} ranks x batch {setting.batch}, epochs {setting.epochs}, "
            f"learning rate {setting.rate:g}"
        )
        yield ""
        yield from table(here, reference)
        yield ""


def table(runs: Runs, reference: str) -> list[str]:
    """Accuracy of each contender after the last epoch, and how far above ``reference`` it is in the same seeds."""
    rows = []
    for contender in dict.fromkeys(cell.contender for cell in runs):
        found = {cell.seed: run for cell, run in runs.items() if cell.contender == contender}
        accuracies = [run["accuracies"][-1] for run in found.values()]
        costs = [fmean(run[name] for run in found.values()) for name in ("collectives_per_step", "seconds")]
        above = "" if contender == reference else written(interval(differences(runs, contender, reference)), sign="+")
        cost = [f"{value:.1f}" for value in costs]
        rows.append([f"`{contender}`", str(len(found)), written(interval(accuracies)), above, *cost])
    return markdown(["contender", "seeds", "accuracy", f"− `{reference}`", "collectives per step", "seconds"], rows)


def differences(runs: Runs, one: str, other: str) -> Sequence[float]:
    """By how many points ``one`` ends above ``other``, for each seed of which both have been run."""
    pairs = [(run, runs.get(cell._replace(contender=other))) for cell, run in runs.items() if cell.contender == one]
    return [run["accuracies"][-1] - base["accuracies"][-1] for run, base in pairs if base is not None]


def main() -> None:
    """Print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("results", type=Path)
    parser.add_argument(
        "--reference", type=contender_of, default=REFERENCE, help="the contender that others are compared with"
    )
    options = parser.parse_args()
    print("\n".join(tables(dict(read_results(options.results, Cell)), options.reference)))


if __name__ == "__main__":
    main()
