"""Warmup: one policy for the first steps, another one for the rest.

Timeline: steps 0 to steps - 1 share by ``first``, and ``then`` takes note of what it shared; after that ``then`` is in
charge and starts warm. MABN starts this way, and so does anything whose old statistics mean nothing while weights jump.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

import torch.distributed as dist
from torch import Tensor

from distnorm.policies.all_reduce import AllReduce
from distnorm.policies.base import Policy, Reducer
from distnorm.transport import LostGroup, Topology
from distnorm.types import Landed, Layout, Slot, Watch


class _Relay(Reducer):
    def __init__(self, first: Reducer, then: Reducer, steps: int) -> None:
        super().__init__(then.size)
        self.first = first
        self.then = then
        self.steps = steps

    def _in_charge(self, slot: Slot) -> Reducer:
        return self.first if slot.step < self.steps else self.then

    def reduce(self, wire: Tensor, slot: Slot) -> Tensor:
        shared = self._in_charge(slot).reduce(wire, slot)
        if slot.step < self.steps and slot.learning:
            self.then.observe(shared, slot, self.first.size)
        return shared

    def lands(self, slot: Slot) -> bool:
        return self._in_charge(slot).lands(slot)

    def counts(self, slot: Slot) -> bool:
        return self._in_charge(slot).counts(slot)

    def end_step(self, slot: Slot, *, observed: bool = False) -> list[Landed]:
        warming = slot.step < self.steps
        landed = self.then.end_step(slot, observed=observed or warming)
        return self.first.end_step(slot) if warming else landed

    def in_flight(self) -> list[Landed]:
        return [*self.first.in_flight(), *self.then.in_flight()]

    def watch(self, slot: Slot, *, exact: bool) -> dict[str, Watch]:
        return self.then.watch(slot, exact=exact)

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first.state_dict(), "then": self.then.state_dict()}

    def load_state_dict(self, state: dict[str, Any], *, own: bool) -> None:
        self.first.load_state_dict(state["first"], own=own)
        self.then.load_state_dict(state["then"], own=own)


@final
@dataclass(frozen=True, kw_only=True)
class Warmup(Policy):
    """``first.reduce`` during ``steps`` steps, ``then.reduce`` after them."""

    first: Policy = field(default_factory=AllReduce)
    then: Policy
    steps: int = 100

    def __post_init__(self) -> None:
        """Validate."""
        if not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(f"Warmup(steps={self.steps!r}): need a whole number of steps, at least 0.")
        for name in ("first", "then"):
            if not isinstance(getattr(self, name), Policy):
                raise ValueError(f"Warmup({name}={getattr(self, name)!r}): need a policy.")
        if self.first.keeps_cotangents:
            raise ValueError(f"Warmup(first={self.first!r}): need an exact policy, such as AllReduce().")

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """Bind both."""
        return _Relay(self.first.bind(topology, layout), self.then.bind(topology, layout), self.steps)

    @property
    def collectives(self) -> float:
        """Those of the policy that stays."""
        return self.then.collectives

    @property
    def background(self) -> float:
        """Those of the policy that stays."""
        return self.then.background

    @property
    def scope(self) -> dist.ProcessGroup | LostGroup | None:
        """That of either."""
        return self.first.scope if self.first.scope is not None else self.then.scope

    @property
    def staleness(self) -> int:
        """That of the policy that stays."""
        return self.then.staleness

    @property
    def always_lands(self) -> bool:
        """If both do."""
        return self.first.always_lands and self.then.always_lands

    @property
    def keeps_cotangents(self) -> bool:
        """As the policy that stays."""
        return self.then.keeps_cotangents
