"""The time of one sum over ranks: linear in the parameters of a network, so that the same formula can be fitted.

docs/plan.md derives the coefficients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from distnorm.transport.group import EXCHANGE_LIMIT_BYTES

Algorithm = Literal["exchange", "gloo_ring", "ring", "tree"]
Backend = Literal["gloo", "nccl"]

ASSUMED_MESSAGE = 2e-6
"""Seconds per peer of an exchange, if only groups of one size were measured, from which it cannot be fitted."""


class Reach(NamedTuple):
    """A group: its number of ranks and of nodes (with equally many of its ranks), and the job's ranks per node."""

    ranks: int
    nodes: int
    local: int


class Weights(NamedTuple):
    """The coefficient of each parameter of ``Network`` in a time; for bandwidths it is a number of bytes."""

    overhead: float = 0.0
    message: float = 0.0
    wake: float = 0.0
    alpha: float = 0.0
    inverse_beta: float = 0.0
    alpha_node: float = 0.0
    inverse_beta_node: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Network:
    """The parameters of a network, in seconds and seconds per byte.

    Args:
        overhead: host time per collective, independent of the number of ranks.
        message: host time per peer to which an exchange sends.
        wake: host time per round of gloo's collectives, in which its threads wake up.
        alpha: time of one round of messages within a node.
        inverse_beta: time of one byte within a node.
        alpha_node: time of one round of messages between nodes.
        inverse_beta_node: time of one byte on a node's link, which its ranks share.
    """

    overhead: float = 0.0
    message: float = 0.0
    wake: float = 0.0
    alpha: float
    inverse_beta: float
    alpha_node: float
    inverse_beta_node: float

    def seconds(self, weights: Weights) -> float:
        """Return the time with the coefficients ``weights``."""
        numbers: list[float] = [count * getattr(self, name) for name, count in weights._asdict().items()]
        return sum(numbers)


class Point(NamedTuple):
    """A measured sum of ``nbytes`` over ``reach``, by ``algorithm``."""

    algorithm: Algorithm
    reach: Reach
    nbytes: int
    seconds: float


def weights(algorithm: Algorithm, reach: Reach, nbytes: int) -> Weights:
    """Return the coefficients of the time of one sum of ``nbytes`` over ``reach``."""
    ranks, nodes, per_node = reach.ranks, reach.nodes, reach.ranks // reach.nodes
    flows = reach.local / per_node  # groups like this one that use a node's link at the same time
    if algorithm == "exchange":
        near, far = (per_node - 1) * nbytes, reach.local * (ranks - per_node) * nbytes
        rounds = Weights(alpha=1) if nodes == 1 else Weights(alpha_node=1)
        return rounds._replace(overhead=1, message=ranks - 1, inverse_beta=near, inverse_beta_node=far)
    if algorithm in ("ring", "gloo_ring"):
        steps, carried = 2 * (ranks - 1), 2 * (ranks - 1) / ranks * nbytes
        asked = algorithm == "gloo_ring"  # gloo's receiver first says that it is ready
        host = Weights(wake=steps) if asked else Weights(overhead=1)
        if nodes == 1:
            return host._replace(alpha=(1 + asked) * steps, inverse_beta=carried)
        return host._replace(alpha_node=(1 + asked) * steps, inverse_beta_node=flows * carried)
    return Weights(
        overhead=1,
        alpha=2 * (per_node - 1),
        inverse_beta=2 * nbytes if per_node > 1 else 0,
        alpha_node=2 * math.ceil(math.log2(nodes)),
        inverse_beta_node=2 * flows * nbytes if nodes > 1 else 0,
    )


def collective_seconds(network: Network, backend: Backend, reach: Reach, nbytes: int, *, background: bool) -> float:
    """Return the time of one sum: on gloo with the algorithm of ``TorchGroup``, on NCCL with the faster one."""
    if backend == "gloo":
        small = not background and nbytes <= EXCHANGE_LIMIT_BYTES
        return network.seconds(weights("exchange" if small else "gloo_ring", reach, nbytes))
    return min(network.seconds(weights(algorithm, reach, nbytes)) for algorithm in ("ring", "tree"))


def fit(points: Sequence[Point], message: float = ASSUMED_MESSAGE) -> Network:
    """Fit a network to ``points``: least squares of relative errors, with no parameter below 0.

    If no point uses one of the two levels (within and between nodes), it gets the parameters of the other. On gloo,
    overhead is part of alpha. ``message`` is fitted if exchanges in groups of different sizes were measured; else it
    is as given.

    Raises:
        ValueError: there are no points.
    """
    if not points:
        raise ValueError("nothing was measured: there are no points to fit a network to.")
    rows = [weights(point.algorithm, point.reach, point.nbytes) for point in points]
    sizes = {point.reach.ranks for point in points if point.algorithm == "exchange"}
    free = [name for name in Weights._fields if any(getattr(row, name) for row in rows)]
    if "wake" in free:  # on gloo an exchange is one round, so overhead and alpha cannot be separated
        free.remove("overhead")
    fixed = 0.0
    if len(sizes) < 2 and "message" in free:
        free.remove("message")
        fixed = message
    left = [[getattr(row, name) / point.seconds for name in free] for row, point in zip(rows, points, strict=True)]
    right = [1 - fixed * row.message / point.seconds for row, point in zip(rows, points, strict=True)]
    found = dict(zip(free, _nonnegative(left, right), strict=True))
    near = "alpha" if "alpha" in found else "alpha_node"
    far = "alpha_node" if "alpha_node" in found else "alpha"
    return Network(
        overhead=found.get("overhead", 0.0),
        message=found.get("message", fixed),
        wake=found.get("wake", 0.0),
        alpha=found[near],
        inverse_beta=found.get("inverse_beta", found.get("inverse_beta_node", 0.0)),
        alpha_node=found[far],
        inverse_beta_node=found.get("inverse_beta_node", found.get("inverse_beta", 0.0)),
    )


def _nonnegative(left: list[list[float]], right: list[float]) -> list[float]:
    """Solve least squares under ``x >= 0``: the best feasible solution over all subsets of the few columns."""
    matrix, target = torch.tensor(left, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    scale = matrix.abs().amax(0)
    matrix = matrix / scale
    columns = range(matrix.shape[1])
    best = torch.zeros(len(columns), dtype=torch.float64)
    least = float(target.square().sum())
    for size in range(1, len(columns) + 1):
        for chosen in itertools.combinations(columns, size):
            part = matrix[:, chosen]
            solution = torch.linalg.lstsq(part, target.unsqueeze(1), driver="gelsd").solution[:, 0]
            error = float((part @ solution - target).square().sum())
            if bool((solution >= 0).all()) and error < least:
                least = error
                best = torch.zeros_like(best).index_copy(0, torch.tensor(chosen), solution)
    return [float(value) for value in best / scale]
