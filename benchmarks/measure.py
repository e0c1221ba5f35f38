"""Side by side: contenders take turns within a round, and figures are medians over rounds with a paired interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Interval(NamedTuple):
    """A median and its 95 % interval, which needs no assumption on how values are spread."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """As a table shows it."""
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def rounds(contenders: Mapping[str, Callable[[], float]], count: int, warmup: int = 3) -> dict[str, list[float]]:
    """Milliseconds of every contender in every counted round; each round starts with another contender."""
    names = list(contenders)
    seen: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(count + warmup):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seen[name].append(contenders[name]())
    return {name: values[warmup:] for name, values in seen.items()}


def interval(values: Sequence[float]) -> Interval:
    """The median of ``values`` and the order statistics that hold it with 95 % (sign test)."""
    ordered = sorted(values)
    count = len(ordered)
    below = 0
    while below < count and 2 * _binomial_tail(count, below) <= 0.05:
        below += 1
    low, high = max(below - 1, 0), count - 1 - max(below - 1, 0)
    return Interval(statistics.median(ordered), ordered[low], ordered[high])


def ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    """The median of paired ratios."""
    return interval([one / other for one, other in zip(above, below, strict=True)])


def exposed_ratio(ours: Sequence[float], theirs: Sequence[float], base: Sequence[float]) -> Interval:
    """Exposed communication of ours over theirs: what a step takes longer than ``base``'s in the same round.

    Differences of single steps scatter around 0 where the machine is noisy, and their ratios have no median to speak
    of. So the rounds are cut into blocks, and the ratio is taken of each block's median differences.
    """
    size = max(5, len(base) // 20)
    starts = range(0, len(base) - size + 1, size)
    blocks = [
        (
            statistics.median(a - b for a, b in zip(ours[i : i + size], base[i : i + size], strict=True)),
            statistics.median(a - b for a, b in zip(theirs[i : i + size], base[i : i + size], strict=True)),
        )
        for i in starts
    ]
    return interval([one / other if other > 0 else math.inf for one, other in blocks])


def _binomial_tail(count: int, below: int) -> float:
    """The probability that at most ``below`` of ``count`` fair coins show heads."""
    return float(sum(math.comb(count, heads) for heads in range(below + 1)) / 2**count)
