"""Which ranks' sums a reducer joins: the groups that they pass on their way, told by every rank and put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

Route = tuple[tuple[int, ...], ...]
"""The groups of one rank through which sums go, in order; none where they stay what they are."""

Routes = list[Route] | None
"""All that sums may take, in an order that is the same on all ranks; None where a reducer does not say."""


def followed_by(routes: Routes, later: Routes) -> Routes:
    """Every one of ``routes`` and then every one of ``later``."""
    if routes is None or later is None:
        return None
    return [one + other for one in routes for other in later]


def either(routes: Routes, others: Routes) -> Routes:
    """One of ``routes`` or of ``others``."""
    return None if routes is None or others is None else routes + others


# docs/decisions.md#what-is-known-of-a-policy-before-ranks-are
def joined(by_rank: Mapping[int, Route]) -> dict[int, Counter[int]]:
    """For every rank, how often each rank's sums are contained in what it gets, where all follow their routes."""
    contained = {rank: Counter({rank: 1}) for rank in by_rank}
    for hop in range(len(next(iter(by_rank.values())))):
        totals: dict[tuple[int, ...], Counter[int]] = {}
        for route in by_rank.values():
            if route[hop] not in totals:
                total = totals[route[hop]] = Counter()
                for rank in route[hop]:
                    total.update(contained.get(rank, ()))  # in place: adding P counters up would take P^2
        contained = {rank: totals[route[hop]] for rank, route in by_rank.items()}
    return contained
