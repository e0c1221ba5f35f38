"""What is known of a policy before and after its ranks are known: one value, which each wrapper combines by a function.

Tools, layers and binding ask ``Policy.facts`` before ranks are known. ``Reducer.facts`` adds which ranks it joins.
Facts that depend on the step are in ``Completeness``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch.distributed as dist

from distnorm.policies.routes import Routes, either, followed_by
from distnorm.transport import LostGroup


class Completeness(NamedTuple):
    """How complete the result of ``reduce`` is for a slot.

    Fields:
        is_global: whether it contains everything that is shared, so that the running statistics may be updated with it.
        is_counted: whether its count is the number of values in it.
    """

    is_global: bool = True
    is_counted: bool = True


# docs/decisions.md#what-is-known-of-a-policy-before-ranks-are
@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a policy. A reducer, whose ranks are known, sets the last four as well.

    Attributes:
        collectives: blocking ones per layer, direction and step, on average.
        background: asynchronous ones per step, for all layers together.
        staleness: the steps that a collective has until its result is needed; 0 means that it blocks.
        always_global: whether the statistics of every step are global (see ``Completeness``).
        keeps_cotangents: whether cotangents outlive their step. Loss scales must then be divided out, second
            derivatives do not exist, and values that are not finite must not be kept.
        groups: the user's process groups that it names.
        bounded: whether it shares with no rank outside of ``groups``.
        routes: the groups through which ``reduce`` shares statistics, in any step; None if they are not known.
        global_routes: the routes of the statistics that update the running statistics.
        handovers: pairs of routes that must join the same ranks: one policy's shared sums are the other one's state.
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
        """Return whether there is any collective."""
        return self.collectives > 0 or self.background > 0

    @property
    def scope(self) -> tuple[dist.ProcessGroup | LostGroup, ...]:
        """Return the groups that limit which ranks the policy concerns; none if it concerns all data-parallel ranks."""
        return self.groups if self.bounded else ()

    def along(self, routes: Routes, *, alone: bool = False) -> Facts:
        """Add the ``routes`` of a reducer, which all its statistics take."""
        return replace(self, routes=routes, global_routes=routes, alone=alone)


def in_sequence(*parts: Facts) -> Facts:
    """Combine the facts of policies that are applied one after another in every step."""
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
    """Return the routes that are global: those of all parts, or of what a part makes global at the end of a step."""
    found = functools.reduce(followed_by, (part.global_routes for part in parts))
    before: Routes = [()]
    for part in parts:
        if part.staleness:
            found = either(found, followed_by(before, part.global_routes))
        before = followed_by(before, part.routes)
    return found


def first_then(first: Facts, then: Facts) -> Facts:
    """Combine the facts of ``first`` for a limited time and ``then`` afterwards. Either scope limits the result."""
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
    """Return the facts of a policy that is applied in every ``k``-th step."""
    return replace(
        facts,
        collectives=facts.collectives / k,
        background=facts.background / k,
        always_global=k == 1 and facts.always_global,
        routes=facts.routes if k == 1 else either(facts.routes, [()]),
        alone=False,
    )
