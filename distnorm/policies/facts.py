"""What is known of a policy, before ranks are and after: one value, which each wrapper combines by one function.

``Policy.facts`` is what tools, layers and binding ask before ranks are known; ``Reducer.facts`` adds which ranks it
joins. What depends on the step is a ``Completeness``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch.distributed as dist

from distnorm.policies.routes import Routes, either, followed_by
from distnorm.transport import LostGroup


class Completeness(NamedTuple):
    """How much of what it shares is in what ``reduce`` returns for a slot.

    Fields:
        is_global: all of it, so that running statistics may absorb the statistics.
        is_counted: their count is how many values they rest on.
    """

    is_global: bool = True
    is_counted: bool = True


# docs/decisions.md#what-is-known-of-a-policy-before-ranks-are
@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a policy; of a reducer, once ranks are known, with the last four.

    Attributes:
        collectives: blocking ones per layer, direction and step, on average.
        background: asynchronous ones per step, for all layers together.
        staleness: steps that a collective is given before anyone waits for it; 0 means that it blocks.
        always_global: whether the statistics of every step are global ones (see ``Completeness``).
        keeps_cotangents: whether cotangents outlive their step: loss scales must come out of them, second derivatives
            do not exist, and nothing that is not finite may be kept.
        groups: the process groups of the user's that it names.
        bounded: whether it shares with nobody beyond these.
        routes: by which groups ``reduce`` joins statistics, in one step or another; None if that is not known.
        global_routes: those of the statistics that running statistics absorb.
        handovers: pairs of routes that must join the same ranks: what one policy has shared is another one's memory.
        alone: whether ``reduce`` is the identity, and its result global, in every step.
    """

    collectives: float = 0.0
    background: float = 0.0
    staleness: int = 0
    always_global: bool = True
    keeps_cotangents: bool = False
    groups: tuple[dist.ProcessGroup | LostGroup, ...] = ()
    bounded: bool = False
    routes: Routes = None
    global_routes: Routes = None
    handovers: tuple[tuple[Routes, Routes], ...] = ()
    alone: bool = False

    @property
    def communicates(self) -> bool:
        """Whether there is any collective."""
        return self.collectives > 0 or self.background > 0

    @property
    def scope(self) -> tuple[dist.ProcessGroup | LostGroup, ...]:
        """The groups that bound which ranks the policy concerns; none where these are all data-parallel ranks."""
        return self.groups if self.bounded else ()

    def along(self, routes: Routes, *, alone: bool = False) -> Facts:
        """With the ``routes`` of a reducer, which all its statistics take."""
        return replace(self, routes=routes, global_routes=routes, alone=alone)


def in_sequence(*parts: Facts) -> Facts:
    """Of policies that are applied one after the other in every step."""
    return Facts(
        collectives=sum(part.collectives for part in parts),
        background=sum(part.background for part in parts),
        staleness=max(part.staleness for part in parts),
        always_global=all(part.always_global for part in parts),
        keeps_cotangents=any(part.keeps_cotangents for part in parts),
        groups=tuple(group for part in parts for group in part.groups),
        bounded=all(part.bounded for part in parts),
        routes=functools.reduce(followed_by, (part.routes for part in parts)),
        global_routes=_global_routes(parts),
        handovers=tuple(pair for part in parts for pair in part.handovers),
        alone=all(part.alone for part in parts),
    )


def _global_routes(parts: tuple[Facts, ...]) -> Routes:
    """What all parts return is global, or what a part makes so, at a step's end, of what came to it."""
    found = functools.reduce(followed_by, (part.global_routes for part in parts))
    before: Routes = [()]
    for part in parts:
        if part.staleness:
            found = either(found, followed_by(before, part.global_routes))
        before = followed_by(before, part.routes)
    return found


def first_then(first: Facts, then: Facts) -> Facts:
    """Of ``first`` for a limited time, and ``then`` for good; the scope of either bounds both."""
    return replace(
        then,
        always_global=first.always_global and then.always_global,
        keeps_cotangents=first.keeps_cotangents or then.keeps_cotangents,
        groups=first.groups + then.groups,
        bounded=bool(first.scope or then.scope),
        routes=either(first.routes, then.routes),
        global_routes=either(first.global_routes, then.global_routes),
        handovers=((first.routes, then.routes),) * then.keeps_cotangents + first.handovers + then.handovers,
        alone=False,
    )


def every_kth(facts: Facts, k: int) -> Facts:
    """Of a policy that is applied in every ``k``-th step."""
    return replace(
        facts,
        collectives=facts.collectives / k,
        background=facts.background / k,
        always_global=k == 1 and facts.always_global,
        routes=facts.routes if k == 1 else either(facts.routes, [()]),
        alone=False,
    )
