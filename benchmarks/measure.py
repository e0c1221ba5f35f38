"""Side by side: contenders take turns within a round, and figures are medians over rounds with a paired interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

from distnorm.diagnostics.bench_statistics import Interval, interval


def rounds(contenders: Mapping[str, Callable[[], float]], count: int, warmup: int = 3) -> dict[str, list[float]]:
    """Milliseconds of every contender in every counted round; each round starts with another contender."""
    names = list(contenders)
    seen: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(count + warmup):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seen[name].append(contenders[name]())
    return {name: values[warmup:] for name, values in seen.items()}


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
