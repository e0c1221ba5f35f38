"""Warmup: one policy for the first steps, another one for the rest.

Timeline: in steps 0 to steps - 1, ``first`` shares and ``then`` records the results. After that ``then`` is active and
starts with those entries. MABN starts this way, as should any policy with stale statistics while weights change fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, final

from torch import Tensor

from distnorm.policies.all_reduce import AllReduce
from distnorm.policies.base import APolicy, Policy, Reducer
from distnorm.policies.facts import Completeness, Facts, first_then
from distnorm.policies.stored import Check, fields
from distnorm.transport import Topology
from distnorm.types import GlobalStatistics, Layout, Slot, Watch
from distnorm.validation import Steps, check_fields


class _Relay(Reducer):
    def __init__(self, first: Reducer, then: Reducer, steps: int, *, remembers: bool) -> None:
        """Relay to ``first`` and then to ``then``; ``remembers``: ``then`` keeps what it observes."""
        super().__init__(then.size, first_then(first.facts, replace(then.facts, keeps_cotangents=remembers)))
        self.first = first
        self.then = then
        self.steps = steps

    def reduce(self, payload: Tensor, slot: Slot) -> Tensor:
        if slot.step >= self.steps:
            return self.then.reduce(payload, slot)
        shared = self.first.reduce(payload, slot)
        if slot.learning:
            self.then.observe(shared, slot, self.first.size)
        return shared

    def completeness(self, slot: Slot) -> Completeness:
        return (self.first if slot.step < self.steps else self.then).completeness(slot)

    def observe(self, shared: Tensor, slot: Slot, contributions: float) -> None:
        self.then.observe(shared, slot, contributions)

    def end_step(self, slot: Slot, *, observed: bool = False) -> list[GlobalStatistics]:
        warming = slot.step < self.steps
        statistics = self.then.end_step(slot, observed=observed or warming)
        return [*statistics, *self.first.end_step(slot)] if warming else statistics

    def in_flight(self) -> list[GlobalStatistics]:
        return [*self.first.in_flight(), *self.then.in_flight()]

    def watch(self, slot: Slot, *, exact: bool) -> dict[str, Watch]:
        return self.then.watch(slot, exact=exact)

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first.state_dict(), "then": self.then.state_dict()}

    def load_state_dict(self, state: dict[str, Any], *, own: bool) -> None:
        self.first.load_state_dict(state.get("first", {}), own=own)
        self.then.load_state_dict(state.get("then", {}), own=own)


@final
@dataclass(frozen=True, kw_only=True)
class Warmup(Policy):
    """``first.reduce`` during the first ``steps`` steps, ``then.reduce`` afterwards."""

    first: APolicy = field(default_factory=AllReduce)
    then: APolicy
    steps: Steps = 100

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)
        if self.first.facts.keeps_cotangents:
            raise ValueError(f"Warmup(first={self.first!r}): need an exact policy, such as AllReduce().")
        shares = self.first.facts.communicates and self.first.facts.always_global
        if self.then.facts.keeps_cotangents and not shares:
            raise ValueError(
                f"Warmup(first={self.first!r}, then={self.then!r}): the second policy starts with what the first one "
                "shared, so that must share in every step. Use AllReduce(), or another exact policy."
            )

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """Bind both policies."""
        first, then = self.first.bind(topology, layout), self.then.bind(topology, layout)
        return _Relay(first, then, self.steps, remembers=self.then.facts.keeps_cotangents)

    @property
    def facts(self) -> Facts:
        """Return the facts of the second policy, with the groups of both."""
        return first_then(self.first.facts, self.then.facts)

    @property
    def memory(self) -> str:
        """Return the memory of the second policy, for any length of the warm-up."""
        return f"Warmup(then={self.then.memory})" if self.then.memory else ""

    def stores(self, layout: Layout) -> Check:
        """Return the checks of both; the state of the first one is optional."""
        then = {"then": self.then.stores(layout)}
        first = self.first.stores(layout)
        return fields(then, first=first) if self.then.memory else fields({}, first=first, **then)
