"""How long sums over this job's ranks take, by size, for each kind of group that recipes use."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distnorm.diagnostics.bench_rounds import synchronize, take_turns
from distnorm.diagnostics.plan_cost import Algorithm, Point, Reach
from distnorm.transport import Topology, TorchGroup
from distnorm.transport.group import EXCHANGE_LIMIT_BYTES
from distnorm.types import Slot

SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 17, 1 << 18)
"""Bytes: a layer of 64 channels, one of 512, and three that show what a byte costs."""

_WORK = 320
"""Side of the matrices that are multiplied before each sum."""

_CUT = 0.02
"""Part of the rounds at either end that does not count: an interruption of the machine says nothing of the network."""

_SLOT = Slot("bench", "forward", 0)


@dataclass(frozen=True, kw_only=True)
class Link:
    """Sums over one kind of group, by one algorithm.

    Attributes:
        where: all ranks, neighbours, in a node, or between nodes.
        algorithm: how the sum is made.
        reach: the group.
        points: what was measured.
    """

    where: str
    algorithm: Algorithm
    reach: Reach
    points: tuple[Point, ...]

    def line(self) -> tuple[float, float]:
        """Seconds of an empty sum, and bytes per second: a line through the points, relative errors weighing alike."""
        left = torch.tensor([[1 / point.seconds, point.nbytes / point.seconds] for point in self.points])
        left = left.double()
        scale = left.amax(0)
        right = torch.ones(len(self.points), 1, dtype=torch.float64)
        alpha, slope = (torch.linalg.lstsq(left / scale, right).solution[:, 0] / scale).tolist()
        return max(alpha, 0.0), 1 / slope if slope > 0 else float("inf")

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        alpha, bandwidth = self.line()
        return {
            "where": self.where,
            "algorithm": self.algorithm,
            **self.reach._asdict(),
            "latency_seconds": alpha,
            "bytes_per_second": bandwidth if bandwidth != float("inf") else None,
            "points": [{"bytes": point.nbytes, "seconds": point.seconds} for point in self.points],
        }


def measure_links(
    topology: Topology,
    local: int,
    device: torch.device,
    seconds: float,
    tell: Callable[[float], None],
    sizes: tuple[int, ...] = SIZES,
) -> list[Link]:
    """Sums of ``sizes`` bytes over the groups of ``topology`` take turns for ``seconds``. Collective over its ranks.

    A computation comes before each sum, as in a training step: a loop of nothing but sums finds every thread awake and
    flatters. ``of_all_ranks`` says what counts. Of the rounds it is the mean, since the times of a step's collectives
    add up and medians do not, without both ends.
    """
    contenders: dict[tuple[str, Algorithm, int], Callable[[], float]] = {}
    reaches: dict[tuple[str, Algorithm], Reach] = {}
    for where, group in _groups(topology, local).items():
        nodes = len({topology.nodes[topology.ranks.index(rank)] for rank in group.ranks})
        for algorithm, wrapped in _algorithms(group, device).items():
            reaches[where, algorithm] = Reach(group.size, nodes, local)
            for nbytes in _taken(algorithm, sizes):
                contenders[where, algorithm, nbytes] = _timer(wrapped, nbytes, device)
    seen = take_turns(contenders, seconds, device, tell)
    groups = _groups(topology, local)
    found = {
        key: _middle_mean(of_all_ranks(torch.tensor(seen[key], dtype=torch.float64, device=device), groups[key[0]]))
        for key in contenders
    }
    return [
        Link(
            where=where,
            algorithm=algorithm,
            reach=reach,
            points=tuple(
                Point(algorithm, reach, nbytes, found[where, algorithm, nbytes]) for nbytes in _taken(algorithm, sizes)
            ),
        )
        for (where, algorithm), reach in reaches.items()
    ]


def of_all_ranks(times: Tensor, group: TorchGroup) -> Tensor:
    """How long sums took that took each rank ``times``: the least time of all ranks, or the mean. One collective.

    Ranks do not come together, and who comes first waits for the others. Where they share memory, the last one waits
    for nobody: the least. Where messages travel, a rank that is early by less than their delay waits as much longer as
    the other waits shorter, and so on from sum to sum: the mean is the delay, and the least can be anything below.
    """
    if group.direct is None or not group.direct.over_network:
        dist.all_reduce(times, dist.ReduceOp.MIN)
        return times
    dist.all_reduce(times)
    return times / dist.get_world_size()


def _middle_mean(times: Tensor) -> float:
    values = times.tolist()
    cut = int(_CUT * len(values))
    return statistics.fmean(sorted(values)[cut : len(values) - cut])


def _groups(topology: Topology, local: int) -> dict[str, TorchGroup]:
    """By what they are called: all ranks; pairs, which tell rounds from the host's part; and the levels of nodes."""
    world = len(topology.ranks)
    groups = {"all ranks": topology.everyone()}
    if world > local > 1:
        groups["in a node"] = topology.along("local")
        groups["between nodes"] = topology.along("node")
    if local > 2 and local % 2 == 0:
        groups["neighbours"] = topology.blocks(2)
    return {name: group for name, group in groups.items() if isinstance(group, TorchGroup) and group.size > 1}


def _algorithms(group: TorchGroup, device: torch.device) -> dict[Algorithm, TorchGroup]:
    """On gloo there is a choice, by size. NCCL takes a tree for small vectors."""
    if device.type in group.gloo_devices:
        return {"exchange": group, "gloo_ring": TorchGroup(group.process_group, group.ranks, exchange_limit_bytes=-1)}
    return {"tree": group}


def _taken(algorithm: Algorithm, sizes: tuple[int, ...]) -> list[int]:
    return [nbytes for nbytes in sizes if algorithm != "exchange" or nbytes <= EXCHANGE_LIMIT_BYTES]


def _timer(group: TorchGroup, nbytes: int, device: torch.device) -> Callable[[], float]:
    wire = torch.ones(nbytes // 8, dtype=torch.float64, device=device)
    work = torch.ones(_WORK, _WORK, device=device)

    at_once = group.direct is not None and not group.direct.over_network

    def once() -> float:
        if at_once:  # so quick a sum shows what the threads of the last contender left to do
            group.sum(wire, _SLOT)
        _ = work @ work
        synchronize(device)
        started = time.perf_counter()
        total: Tensor = group.sum(wire, _SLOT)
        synchronize(total.device)
        return time.perf_counter() - started

    return once
