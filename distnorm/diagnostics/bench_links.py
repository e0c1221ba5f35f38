"""Measure how long sums over this job's ranks take, by size, for each kind of group that recipes use."""

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
"""Sizes in bytes: a layer of 64 channels, one of 512, and three from which the time per byte is fitted."""

_WORK = 320
"""Side of the matrices that are multiplied before each sum."""

_CUT = 0.02
"""Part of the rounds that is discarded at either end, since interruptions of the machine are not the network's."""

_SLOT = Slot("bench", "forward", 0)


@dataclass(frozen=True, kw_only=True)
class Link:
    """Sums over one kind of group, by one algorithm.

    Attributes:
        where: name of the group: all ranks, neighbours, in a node, or between nodes.
        algorithm: how the sum is computed.
        reach: size of the group.
        points: the measured times.
    """

    where: str
    algorithm: Algorithm
    reach: Reach
    points: tuple[Point, ...]

    def line(self) -> tuple[float, float]:
        """Return latency in seconds and bandwidth in bytes per second: a line with the least relative errors."""
        left = torch.tensor([[1 / point.seconds, point.nbytes / point.seconds] for point in self.points])
        left = left.double()
        scale = left.amax(0)
        right = torch.ones(len(self.points), 1, dtype=torch.float64)
        alpha, slope = (torch.linalg.lstsq(left / scale, right).solution[:, 0] / scale).tolist()
        return max(alpha, 0.0), 1 / slope if slope > 0 else float("inf")

    def record(self) -> dict[str, Any]:
        """Return the JSON record."""
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
    on_progress: Callable[[float], None],
    sizes: tuple[int, ...] = SIZES,
) -> list[Link]:
    """Measure sums of ``sizes`` bytes over the groups of ``topology``, in turns, for ``seconds``. Collective.

    A computation precedes each sum, as in a training step. In a loop of sums only, all threads would still spin-wait,
    and the times would be too good. ``of_all_ranks`` combines the times of ranks. Over rounds they are averaged,
    without the extremes: the times of a step's collectives add up, and medians would not.
    """
    contenders: dict[tuple[str, Algorithm, int], Callable[[], float]] = {}
    reaches: dict[tuple[str, Algorithm], Reach] = {}
    for where, group in _groups(topology, local).items():
        nodes = len({topology.nodes[topology.ranks.index(rank)] for rank in group.ranks})
        for algorithm, wrapped in _algorithms(group, device).items():
            reaches[where, algorithm] = Reach(group.size, nodes, local)
            for nbytes in _taken(algorithm, sizes):
                contenders[where, algorithm, nbytes] = _timer(wrapped, nbytes, device)
    seen = take_turns(contenders, seconds, device, on_progress)
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
    """Combine the ``times`` that each rank measured: to their minimum, or to their mean. Issues one collective.

    Ranks do not start a sum at the same time, and the first one waits for the others. With shared memory, the last one
    does not wait, so the minimum is the time of the sum. With messages, a rank that is early by less than their delay
    waits longer by as much as the other waits less, from sum to sum. Then the mean is the delay, and the minimum can be
    anything below it.
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
    """Return groups by name: all ranks; the levels of nodes; pairs, which separate rounds from the host's time."""
    world = len(topology.ranks)
    groups = {"all ranks": topology.everyone()}
    if world > local > 1:
        groups["in a node"] = topology.along("local")
        groups["between nodes"] = topology.along("node")
    if local > 2 and local % 2 == 0:
        groups["neighbours"] = topology.blocks(2)
    return {name: group for name, group in groups.items() if isinstance(group, TorchGroup) and group.size > 1}


def _algorithms(group: TorchGroup, device: torch.device) -> dict[Algorithm, TorchGroup]:
    """Return the algorithms to measure: two on gloo, where the size decides; NCCL uses a tree for small vectors."""
    if device.type in group.gloo_devices:
        return {"exchange": group, "gloo_ring": TorchGroup(group.process_group, group.ranks, exchange_limit_bytes=-1)}
    return {"tree": group}


def _taken(algorithm: Algorithm, sizes: tuple[int, ...]) -> list[int]:
    return [nbytes for nbytes in sizes if algorithm != "exchange" or nbytes <= EXCHANGE_LIMIT_BYTES]


def _timer(group: TorchGroup, nbytes: int, device: torch.device) -> Callable[[], float]:
    payload = torch.ones(nbytes // 8, dtype=torch.float64, device=device)
    work = torch.ones(_WORK, _WORK, device=device)

    at_once = group.direct is not None and not group.direct.over_network

    def once() -> float:
        if at_once:  # without this sum, work that the previous measurement's threads left would be measured too
            group.sum(payload, _SLOT)
        _ = work @ work
        synchronize(device)
        started = time.perf_counter()
        total: Tensor = group.sum(payload, _SLOT)
        synchronize(total.device)
        return time.perf_counter() - started

    return once
