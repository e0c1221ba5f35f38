"""What is known of a policy before ranks are: one value, which wrappers combine."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.distributed as dist

from distnorm.transport import LostGroup


# docs/decisions.md#what-is-known-of-a-policy-before-ranks-are
@dataclass(frozen=True, kw_only=True)
class Facts:
    """What tools, layers and binding ask of a policy.

    Attributes:
        collectives: blocking ones per layer, direction and step, on average.
        background: asynchronous ones per step, for all layers together.
        staleness: steps that a collective is given before anyone waits for it; 0 means that it blocks.
        always_lands: whether the statistics of every step are shared ones (see ``Reducer.lands``).
        keeps_cotangents: whether cotangents outlive their step: loss scales must come out of them, second derivatives
            do not exist, and nothing that is not finite may be kept.
        groups: the process groups of the user's that it names.
        bounded: whether it shares with nobody beyond these.
    """

    collectives: float = 0.0
    background: float = 0.0
    staleness: int = 0
    always_lands: bool = True
    keeps_cotangents: bool = False
    groups: tuple[dist.ProcessGroup | LostGroup, ...] = ()
    bounded: bool = False

    @property
    def communicates(self) -> bool:
        """Whether there is any collective."""
        return self.collectives > 0 or self.background > 0

    @property
    def scope(self) -> tuple[dist.ProcessGroup | LostGroup, ...]:
        """The groups that bound which ranks the policy concerns; none where these are all data-parallel ranks."""
        return self.groups if self.bounded else ()


def in_sequence(*parts: Facts) -> Facts:
    """Of policies that are applied one after the other in every step."""
    return Facts(
        collectives=sum(part.collectives for part in parts),
        background=sum(part.background for part in parts),
        staleness=max(part.staleness for part in parts),
        always_lands=all(part.always_lands for part in parts),
        keeps_cotangents=any(part.keeps_cotangents for part in parts),
        groups=tuple(group for part in parts for group in part.groups),
        bounded=all(part.bounded for part in parts),
    )


def first_then(first: Facts, then: Facts) -> Facts:
    """Of ``first`` for a limited time, and ``then`` for good; the scope of either bounds both."""
    return replace(
        then,
        always_lands=first.always_lands and then.always_lands,
        keeps_cotangents=first.keeps_cotangents or then.keeps_cotangents,
        groups=first.groups + then.groups,
        bounded=bool(first.scope or then.scope),
    )


def every_kth(facts: Facts, k: int) -> Facts:
    """Of a policy that is applied in every ``k``-th step."""
    return replace(
        facts,
        collectives=facts.collectives / k,
        background=facts.background / k,
        always_lands=k == 1 and facts.always_lands,
    )
