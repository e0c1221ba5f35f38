"""The report of the digits example: what a run measured, one plain-text table, one picture."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

HEADER = ("recipe", "validation accuracy (%)", "step (ms)", "collectives/step", "bytes/step", "staleness (steps)")


@dataclass
class Run:
    """What one training run measured.

    Attributes:
        recipe: the contender.
        curve: validation accuracy after every epoch, in percent; empty except on rank 0.
        step_seconds: duration of every training step.
        collectives: normalization collectives in all steps.
        payload: bytes that this rank contributed to them.
    """

    recipe: str
    curve: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    collectives: int = 0
    payload: int = 0


def format_table(runs: list[Run], staleness: dict[str, int]) -> str:
    """Format one row per contender under a header; ``staleness`` is the age of its statistics, in steps."""
    rows = [HEADER, tuple("-" * len(title) for title in HEADER)]
    rows += [_row(recipe, group, staleness[recipe]) for recipe, group in _by_recipe(runs).items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_align(row, widths) for row in rows)


def draw_curves(runs: list[Run], path: Path) -> None:
    """Write a picture of validation accuracy by epoch: the mean over seeds, in a band of one spread."""
    mpl.use("Agg")  # needs no display
    groups = _by_recipe(runs)
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for recipe, group in groups.items():
        points = list(zip(*(run.curve for run in group), strict=True))
        epochs = range(1, len(points) + 1)
        mean = [fmean(point) for point in points]
        low = [fmean(point) - _spread(point) for point in points]
        high = [fmean(point) + _spread(point) for point in points]
        (line,) = axes.plot(epochs, mean, marker="o", markersize=4, label=f"{recipe}: {mean[-1]:.1f} %")
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    seeds = len(runs) // len(groups)
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)", title=f"Mean and standard deviation over {seeds} seeds")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=True, alpha=0.3)
    axes.legend(title="recipe and final accuracy", loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _by_recipe(runs: list[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.recipe, []).append(run)
    return groups


def _row(recipe: str, runs: list[Run], staleness: int) -> tuple[str, ...]:
    final = [run.curve[-1] for run in runs]
    seconds = [second for run in runs for second in run.step_seconds]
    return (
        recipe,
        f"{fmean(final):.1f}" + (f" ± {_spread(final):.1f}" if len(final) > 1 else ""),
        f"{1000 * median(seconds):.1f}",
        f"{sum(run.collectives for run in runs) / len(seconds):.1f}",
        _human(sum(run.payload for run in runs) / len(seconds)),
        str(staleness),
    )


def _spread(values: list[float] | tuple[float, ...]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _human(size: float) -> str:
    if size < 1024:
        return f"{size:.0f} B"
    return f"{size / 1024:.1f} KiB" if size < 1024**2 else f"{size / 1024**2:.1f} MiB"


def _align(row: tuple[str, ...], widths: list[int]) -> str:
    name, *numbers = row
    cells = [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
    return "  ".join([name.ljust(widths[0]), *cells])
