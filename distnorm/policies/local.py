"""Local: nothing is shared.

Timeline: no collective, staleness 0. Each rank normalizes by its own batch, as ``nn.BatchNorm`` does under
DistributedDataParallel. It is the headroom of every other policy: the most that communication work could win.
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
    def reduce(self, wire: Tensor, slot: Slot) -> Tensor:
        return wire


@final
@dataclass(frozen=True, kw_only=True)
class Local(Policy):
    """Every rank keeps its own statistics: ``reduce(wire) = wire``. No collective."""

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """No group is needed."""
        return _Identity(1, self.facts.along([()], alone=True))

    @property
    def facts(self) -> Facts:
        """No collective, with nobody."""
        return Facts(bounded=True)

    def stores(self, layout: Layout) -> Check:
        """Nothing."""
        return fields({})
