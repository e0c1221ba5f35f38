"""Local: nothing is shared.

Timeline: no collective, staleness 0. Each rank normalizes with its local batch, as ``nn.BatchNorm`` does under
DistributedDataParallel. It gives the bound for every other policy: the most that faster communication could gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor

from distnorm.policies.base import Policy, Reducer
from distnorm.policies.facts import Facts
from distnorm.policies.stored import Check, fields
from distnorm.transport import Topology
from distnorm.types import Layout, Slot


class _Identity(Reducer):
    def reduce(self, payload: Tensor, slot: Slot) -> Tensor:
        return payload


@final
@dataclass(frozen=True, kw_only=True)
class Local(Policy):
    """Keep the statistics of every rank local: ``reduce(payload) = payload``. Issues no collective."""

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """Return a reducer without a group."""
        return _Identity(1, self.facts.along([()], alone=True))

    @property
    def facts(self) -> Facts:
        """Return the facts of no collective, over no other rank."""
        return Facts(bounded=True)

    def stores(self, layout: Layout) -> Check:
        """Return the check of an empty state."""
        return fields({})
