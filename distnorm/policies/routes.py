"""Which ranks' sums a reducer joins: every rank reports the groups that its sums pass, and the reports are combined."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

Route = tuple[tuple[int, ...], ...]
"""The groups of one rank that sums pass, in order; empty if they stay local."""

Routes = list[Route] | None
"""All routes that sums may take, in the same order on all ranks; None if the reducer does not say."""


def followed_by(routes: Routes, later: Routes) -> Routes:
    """Return each of ``routes`` followed by each of ``later``."""
    if routes is None or later is None:
        return None
    return [one + other for one in routes for other in later]


def either(routes: Routes, others: Routes) -> Routes:
    """Return the routes of both."""
    return None if routes is None or others is None else routes + others


# docs/decisions.md#what-is-known-of-a-policy-before-ranks-are
def joined(by_rank: Mapping[int, Route]) -> dict[int, Counter[int]]:
    """Return for every rank how often it receives the sums of each rank, when all ranks follow their routes."""
    contained = {rank: Counter({rank: 1}) for rank in by_rank}
    for hop in range(len(next(iter(by_rank.values())))):
        totals: dict[tuple[int, ...], Counter[int]] = {}
        for route in by_rank.values():
            if route[hop] not in totals:
                total = totals[route[hop]] = Counter()
                for rank in route[hop]:
                    total.update(contained.get(rank, ()))  # in place: adding P counters would take P^2
        contained = {rank: totals[route[hop]] for rank, route in by_rank.items()}
    return contained
