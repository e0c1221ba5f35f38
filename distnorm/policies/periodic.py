"""Periodic: share in every k-th step and stay local in between.

Timeline: steps 0, k, 2k, ... issue the collectives of the inner policy, the others issue none. Staleness is 0, since
the steps in between use no remote statistics at all. A step ends with a backward pass that builds no graph.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

from torch import Tensor

from distnorm.policies.all_reduce import AllReduce
from distnorm.policies.base import APolicy, Policy, Reducer
from distnorm.policies.facts import Completeness, Facts, every_kth
from distnorm.policies.stored import Check, fields
from distnorm.transport import Topology
from distnorm.types import Layout, Slot
from distnorm.validation import Period, check_fields


class _EveryKth(Reducer):
    def __init__(self, inner: Reducer, every: int) -> None:
        super().__init__(inner.size, every_kth(inner.facts, every))
        self.inner = inner
        self.every = every

    def reduce(self, payload: Tensor, slot: Slot) -> Tensor:
        return self.inner.reduce(payload, slot) if self._shares(slot) else payload

    def _shares(self, slot: Slot) -> bool:
        # Forwards without a backward pass estimate running statistics: those are always shared.
        still = slot.direction == "forward" and not slot.learning
        return still or slot.step % self.every == 0

    def completeness(self, slot: Slot) -> Completeness:
        return self.inner.completeness(slot) if self._shares(slot) else Completeness(is_global=False)


@final
@dataclass(frozen=True, kw_only=True)
class Periodic(Policy):
    """``reduce = policy.reduce`` in every ``every``-th step, the identity in the others.

    Only the shared steps update the running statistics. They are therefore equal on all ranks at all times, and every
    update includes the batches of all ranks.
    """

    every: Period
    policy: APolicy = field(default_factory=AllReduce)

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)
        if self.policy.facts.keeps_cotangents:
            raise ValueError(f"Periodic(policy={self.policy!r}): need an exact policy, such as AllReduce().")

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """Bind the inner policy."""
        return _EveryKth(self.policy.bind(topology, layout), self.every)

    @property
    def facts(self) -> Facts:
        """Return the facts of the inner policy, averaged over ``every`` steps."""
        return every_kth(self.policy.facts, self.every)

    def stores(self, layout: Layout) -> Check:
        """Return the check of an empty state."""
        return fields({})
