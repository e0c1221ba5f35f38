"""How exposed synchronization grows with layers and channels, ranks and delay: a stack of norm layers and nothing else.

Run ``torchrun --standalone --nproc_per_node 2 benchmarks/growth.py --points 10,64 40,64 160,64``; ranks and delay come
from how it is launched, for instance by ``benchmarks/hosts.py``. Images are 4x4, 4 per rank, so that a step is little
but communication. Contenders alternate in one process at every point. Exposed is a step less the ``local_bn`` step of
its round, and for ``mabn``, after its warm-up, less that of the same method with policy ``Local``.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from measure import Times, difference, finish, markdown, milliseconds, parser_of, rounds
from models import CLASSES
from peers import GatherNorm, NaiveNorm, replace_norms
from torch import nn
from training import stepper

import distnorm
from distnorm import recipes
from distnorm.diagnostics.bench_statistics import Interval, interval
from distnorm.diagnostics.bench_steps import steady
from distnorm.policies import Local

BATCH, SIDE = 4, 4
MABN = steady(recipes.mabn(weights="none"))
RECIPES = {
    "local_bn": recipes.local_bn(),
    "sync_bn": recipes.sync_bn(),
    "mabn": MABN,
    "mabn, Local": dataclasses.replace(MABN, policy=Local()),
}
PEERS = {"gather": GatherNorm, "naive": NaiveNorm}
BASES = {"sync_bn": "local_bn", "mabn": "mabn, Local", "gather": "local_bn", "naive": "local_bn"}
AXES = {"layers": "layers", "channels": "channels per layer", "ranks": "ranks", "delay_ms": "delay one way (ms)"}


class Point(NamedTuple):
    """Where costs were measured."""

    layers: int
    channels: int
    ranks: int
    delay_ms: float


Points = Mapping[Point, Times]


def stack(layers: int, channels: int) -> nn.Sequential:
    """Norm layers, one after the other, and the mean of each channel as a logit."""
    norms = [nn.BatchNorm2d(channels) for _ in range(layers)]
    return nn.Sequential(*norms, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def measured(layers: int, channels: int, options: Any) -> dict[str, list[float]]:
    """Milliseconds per step of every contender at one point."""
    shape = (BATCH, channels, SIDE, SIDE)
    steps: dict[str, Callable[[], float]] = {}
    for name, recipe in RECIPES.items():
        steps[name] = stepper(distnorm.convert(stack(layers, channels), recipe), shape)
    for name, kind in PEERS.items():
        steps[name] = stepper(replace_norms(stack(layers, channels), kind), shape)
    return rounds(steps, options)


def points_of(results: Sequence[Mapping[str, Any]]) -> Points:
    """Times by where they were measured."""
    return {
        Point(each["layers"], each["channels"], result["ranks"], result.get("delay_ms") or 0.0): each["ms"]
        for result in results
        for each in result["points"]
    }


def base_of(points: Points) -> Point:
    """The point through which all axes run: the most frequent value of each."""
    return Point(*(max(column, key=column.count) for column in map(list, zip(*points, strict=True))))


def along(points: Points, axis: str) -> list[Point]:
    """The points that differ from the base by ``axis`` alone."""
    base = base_of(points)._replace(**{axis: 0})
    return sorted(each for each in points if each._replace(**{axis: 0}) == base)


def exposed(times: Times, name: str) -> Interval:
    """What sharing adds to a step, in milliseconds."""
    return interval(difference(times[name], times[BASES[name]]))


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row per point, axis by axis."""
    points = points_of(results)
    rows = []
    for axis in AXES:
        for point in along(points, axis):
            found = {name: exposed(points[point], name) for name in BASES}
            cells = [f"{found[name].median:.1f}" for name in ("sync_bn", "gather", "naive")]
            moving = f"{found['mabn'].median:.1f} [{found['mabn'].low:.1f}, {found['mabn'].high:.1f}]"
            where = [f"**{value:g}**" if name == axis else f"{value:g}" for name, value in point._asdict().items()]
            rows.append([*where, milliseconds(points[point]["local_bn"]), moving, *cells])
    titles = ["layers", "channels", "ranks", "delay, ms", "`local_bn` step, ms"]
    return markdown([*titles, "`mabn` exposed, ms", "`sync_bn`", "gather", "naive"], rows, texts=0)


def draw(results: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Exposed time along each axis, one line per contender. Needs matplotlib."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.use("Agg")  # needs no display
    points = points_of(results)
    figure, panels = plt.subplots(1, len(AXES), figsize=(12, 3.4), sharey=True, layout="constrained")
    for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
        here = along(points, axis)
        places = [getattr(point, axis) for point in here]
        for name, marker in zip(BASES, "os^v", strict=True):
            found = [exposed(points[point], name) for point in here]
            middle = [each.median for each in found]
            error = [[max(m - e.low, 0) for m, e in zip(middle, found, strict=True)]]
            error.append([max(e.high - m, 0) for m, e in zip(middle, found, strict=True)])
            panel.errorbar(places, middle, yerr=error, marker=marker, capsize=2, label=name)
        panel.set(xlabel=label)
        if axis != "delay_ms":
            panel.set_xscale("log", base=2)
        panel.set_xticks(places, [f"{place:g}" for place in places])
        panel.minorticks_off()
        panel.set_yscale("symlog", linthresh=10)  # what is below that is noise
        panel.grid(visible=True, alpha=0.3)
    panels[0].set_ylabel("exposed communication (ms per step)")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    base = base_of(points)
    figure.suptitle(
        f"{base.layers} layers, {base.channels} channels, {base.ranks} ranks, {base.delay_ms:g} ms one way, "
        "but for what the axis varies",
        fontsize=10,
    )
    figure.savefig(path, dpi=72, pil_kwargs={"optimize": True})
    plt.close(figure)


def main() -> None:
    """Measure and print."""
    parser = parser_of("Time stacks of norm layers.", runs=10, warmup=4)
    parser.add_argument("--points", nargs="+", default=["40,64"], metavar="LAYERS,CHANNELS")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    points = []
    for text in options.points:
        layers, channels = map(int, text.split(","))
        if channels < CLASSES:
            parser.error(f"--points {text}: need at least {CLASSES} channels, one for each class")
        points.append({"layers": layers, "channels": channels, "ms": measured(layers, channels, options)})
        gc.collect()  # models and the groups of their ranks hold each other
    result = {"ranks": dist.get_world_size(), "points": points}
    finish(result, table([result]), options.json)


if __name__ == "__main__":
    main()
