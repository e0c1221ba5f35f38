"""Bench: measure what each recipe costs on the ranks of this job, for the user's model."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distnorm.diagnostics.bench_links import Link, measure_links
from distnorm.diagnostics.bench_steps import Row, check_forward, measure_steps
from distnorm.diagnostics.plan_cost import Point, Reach
from distnorm.diagnostics.plan_units import show_bandwidth, show_bytes, show_seconds
from distnorm.transport import Topology
from distnorm.transport.group import backend_for
from distnorm.transport.rendezvous import all_gather_text, group_timeout
from distnorm.transport.topology import node_id

LINKS_PART = 0.2
"""The part of the time budget for latency and bandwidth."""

ProgressCallback = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Report:
    """The results of a measurement.

    Attributes:
        model: name of the function that returned the model.
        batch: the batch of each rank, in words.
        ranks: number of ranks.
        nodes: number of nodes.
        local: ranks per node.
        backend: torch's backend for the device.
        device: name of the device.
        links: latency and bandwidth.
        rows: one per recipe.
    """

    model: str
    batch: str
    ranks: int
    nodes: int
    local: int
    backend: str
    device: str
    links: list[Link]
    rows: list[Row]

    def record(self) -> dict[str, Any]:
        """Return the JSON record; docs/bench.md describes its fields."""
        return {
            "tool": "distnorm bench",
            "format": 1,
            "date": str(date.today()),
            "torch": torch.__version__,
            **{
                name: getattr(self, name) for name in ("model", "batch", "ranks", "nodes", "local", "backend", "device")
            },
            "links": [link.record() for link in self.links],
            "recipes": [row.record() for row in self.rows],
        }

    def table(self) -> str:
        """Format latency and bandwidth, then one row per recipe."""
        nodes = f"{self.nodes} node{'s' if self.nodes > 1 else ''}"
        title = f"{self.model}, {self.batch} per rank; {self.ranks} ranks on {nodes}, {self.backend}, "
        head = [("sum over", "ranks", "by", "latency", "bandwidth", f"of {show_bytes(self._smallest())}")]
        for link in self.links:
            alpha, bandwidth = link.line()
            reach, numbers = link.reach, (show_seconds(alpha), show_bandwidth(bandwidth))
            small = show_seconds(link.points[0].seconds)
            head.append((link.where, str(reach.ranks), link.algorithm, *numbers, small))
        body = [
            ("recipe", "step (ms)", "compute (ms)", "exposed (ms)", "of the step", "collectives/step", "bytes/step")
        ]
        for row in self.rows:
            step, compute = f"{row.step.median * 1e3:.2f}", f"{row.compute.median * 1e3:.2f}"
            exposed = str(type(row.exposed)(*(value * 1e3 for value in row.exposed)))
            share = f"{row.exposed.median / row.compute.median:.1%}"
            body.append((row.recipe, step, compute, exposed, share, f"{row.collectives:g}", show_bytes(row.nbytes)))
        rounds = min(row.rounds for row in self.rows)
        note = f"medians of {rounds} rounds; exposed: a step minus the same step without sharing, with 95 % interval"
        parts = [title + f"{self.device}, torch {torch.__version__}", *([aligned(head)] if self.links else [])]
        return "\n\n".join([*parts, f"{aligned(body)}\n{note}"])

    def _smallest(self) -> int:
        return self.links[0].points[0].nbytes if self.links else 0


def measure(
    model: str,
    build: Callable[[], nn.Module],
    batch: tuple[str, object],
    names: Sequence[str] | None,
    device: torch.device,
    seconds: float,
    on_progress: ProgressCallback,
) -> Report:
    """Measure for about ``seconds``. Collective over all ranks of the job.

    Args:
        model: name of the function that returned it, for the report.
        build: returns the model; called once per measured recipe.
        batch: its name, and the arguments of a forward pass.
        names: recipes; None uses those that differ on the nodes of this job.
        device: the device of this rank.
        seconds: the time budget. It is exceeded if the smallest number of rounds takes longer.
        on_progress: receives the current stage and the part of the budget that has passed.

    Raises:
        ValueError: nodes have different numbers of ranks; a recipe is unknown or does not fit the ranks; the model does
            not accept the batch.
    """
    world = dist.group.WORLD
    assert world is not None, "bench runs in a job"
    topology = _topology(world, device)
    nodes = sorted(set(topology.nodes))
    counts = {node: topology.nodes.count(node) for node in nodes}
    if len(set(counts.values())) > 1:
        raise ValueError(f"distnorm bench: need the same number of ranks on every node; got {counts}.")
    ranks, local = len(topology.ranks), counts[nodes[0]]
    check_forward(build, batch[1], batch[0], device)
    links = []
    if ranks > 1:
        links = measure_links(
            topology, local, device, LINKS_PART * seconds, lambda part: on_progress("network", LINKS_PART * part)
        )
    rows = measure_steps(
        build,
        batch[1],
        names if names is not None else default_recipes(len(nodes), local),
        device,
        (1 - LINKS_PART) * seconds,
        lambda part: on_progress("steps", LINKS_PART + (1 - LINKS_PART) * part),
    )
    return Report(
        model=model,
        batch=batch[0],
        ranks=ranks,
        nodes=len(nodes),
        local=local,
        backend=backend_for(world, device.type) or dist.get_backend(),
        device=platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device),
        links=links,
        rows=rows,
    )


def default_recipes(nodes: int, local: int) -> list[str]:
    """Return the recipes that differ from each other on ``nodes`` nodes of ``local`` ranks."""
    two_levels = ["hierarchical_bn", "group_bn(axis='local')", "hierarchical_mabn"] if nodes > 1 and local > 1 else []
    return ["local_bn", "sync_bn", *two_levels, "mabn", "lazy_bn"]


def read_points(record: Mapping[str, Any]) -> list[Point]:
    """Return the measured sums of a record."""
    return [
        Point(link["algorithm"], Reach(link["ranks"], link["nodes"], link["local"]), point["bytes"], point["seconds"])
        for link in record["links"]
        for point in link["points"]
    ]


def read_step(record: Mapping[str, Any]) -> float:
    """Return the seconds of a step that shares nothing."""
    rows = {row["recipe"]: row for row in record["recipes"]}
    row = rows.get("local_bn") or next(iter(rows.values()))
    return float(row["compute_seconds"]["median"])


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Format text columns: the first one left-aligned, the others right-aligned, with a line under the header."""
    ruled = [rows[0], ["-" * len(title) for title in rows[0]], *rows[1:]]
    widths = [max(map(len, column)) for column in zip(*ruled, strict=True)]
    lines = []
    for name, *cells in ruled:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *numbers]))
    return "\n".join(lines)


def _topology(world: dist.ProcessGroup, device: torch.device) -> Topology:
    ranks = tuple(range(world.size()))
    timeout = group_timeout(world)
    nodes = tuple(all_gather_text(ranks, node_id(), timeout))
    return Topology(ranks, nodes=nodes, timeout=timeout, on_cpu=device.type == "cpu")
