"""Statistics without an assumption on the distribution: medians, and their intervals by the sign test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A median and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Format for a table."""
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def interval(values: Sequence[float]) -> Interval:
    """Return the median of ``values``, and the order statistics that contain it with 95 % confidence (sign test).

    For fewer than six values there is no such interval, and their whole range is returned.
    """
    ordered = sorted(values)
    count = len(ordered)
    below = 0
    while below < count and 2 * _binomial_tail(count, below) <= 0.05:
        below += 1
    low, high = max(below - 1, 0), count - 1 - max(below - 1, 0)
    return Interval(statistics.median(ordered), ordered[low], ordered[high])


def _binomial_tail(count: int, below: int) -> float:
    """Return the probability that at most ``below`` of ``count`` fair coins show heads."""
    return float(sum(math.comb(count, heads) for heads in range(below + 1)) / 2**count)
