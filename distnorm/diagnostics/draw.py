"""Plot measurements of bench and predictions of plan. Needs matplotlib, which ``distnorm[demo]`` installs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from distnorm.diagnostics.bench import Report
    from distnorm.diagnostics.plan import Plan

T = TypeVar("T")

_MARKERS = "os^vDPX*"


def to_file(draw: Callable[[T, Path], None], what: T, path: Path) -> bool:
    """Draw ``what`` into the file ``path`` and return True; without matplotlib, print a message and return False.

    Raises:
        ValueError: matplotlib does not know the suffix of the file name.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print(f"no picture {path}: matplotlib is missing; pip install 'distnorm[demo]'", file=sys.stderr)
        return False
    draw(what, path)
    return True


def draw_plan(plan: Plan, path: Path) -> None:
    """Plot exposed time against ranks, one line per recipe; logarithmic, but linear from 0 to 0.1 ms."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("Agg")  # needs no display
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    names = list(dict.fromkeys(each.recipe for each in plan.predictions))
    for at, name in enumerate(names):
        points = [each for each in plan.predictions if each.recipe == name]
        values = [each.exposed_seconds * 1e3 for each in points]
        # Lines of recipes that cost the same overlap, so the lower ones are wider.
        width, marker = 1 + 0.5 * (len(names) - at), _MARKERS[at % len(_MARKERS)]
        axes.plot([each.world for each in points], values, marker=marker, linewidth=width, label=name)
    axes.axhline(plan.step_seconds * 1e3, color="gray", linestyle="--", label="the step without it")
    axes.set(xlabel="ranks", ylabel="exposed communication (ms per step)", xscale="log")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(bottom=-0.02)
    worlds = sorted({each.world for each in plan.predictions})
    axes.set_xticks(worlds, [str(world) for world in worlds])
    axes.minorticks_off()
    axes.set_title(f"{plan.model}, {plan.backend}, {plan.local} ranks per node", fontsize=10)
    axes.grid(visible=True, alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_bench(report: Report, path: Path) -> None:
    """Plot one bar per recipe: computation, then exposed communication with its interval."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(report.rows) + 1.8), layout="constrained")
    names = [row.recipe for row in reversed(report.rows)]
    compute = [row.compute.median * 1e3 for row in reversed(report.rows)]
    exposed = [max(row.exposed.median, 0.0) * 1e3 for row in reversed(report.rows)]
    low = [max(row.exposed.median - row.exposed.low, 0.0) * 1e3 for row in reversed(report.rows)]
    high = [max(row.exposed.high - row.exposed.median, 0.0) * 1e3 for row in reversed(report.rows)]
    axes.barh(names, compute, label="the same without sharing", color="tab:blue")
    axes.barh(names, exposed, left=compute, xerr=[low, high], label="exposed communication", color="tab:orange")
    axes.set(xlabel="step (ms)", title=f"{report.model}, {report.batch} per rank: {report.ranks} ranks")
    axes.grid(visible=True, axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
