"""Chain: one policy after another.

Timeline: the collectives of all parts, in order; the staleness is the largest of theirs. ``Chain(AllReduce("local"),
AllReduce("node"))`` sums within each node, then between nodes: the exact global sum in two short hops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from distnorm.policies.base import Policy, Reducer
from distnorm.policies.facts import Completeness, Facts, in_sequence
from distnorm.policies.stored import Check, fields
from distnorm.transport import Topology
from distnorm.types import GlobalStatistics, Layout, Slot, Watch


class _Sequence(Reducer):
    def __init__(self, parts: list[Reducer]) -> None:
        facts = in_sequence(*(part.facts for part in parts))
        super().__init__(math.prod(part.size for part in parts), facts)
        self.parts = parts

    def reduce(self, payload: Tensor, slot: Slot) -> Tensor:
        # The adjoint of "first a, then b" is "first b, then a".
        for part in self.parts if slot.direction == "forward" else reversed(self.parts):
            payload = part.reduce(payload, slot)
        return payload

    def completeness(self, slot: Slot) -> Completeness:
        found = [part.completeness(slot) for part in self.parts]
        return Completeness(all(each.is_global for each in found), all(each.is_counted for each in found))

    def observe(self, shared: Tensor, slot: Slot, contributions: float) -> None:
        # What a part would have seen: statistics after the earlier parts, or cotangents after the later ones.
        earlier = 1
        for part in self.parts:
            if slot.direction == "forward":
                part.observe(shared, slot, contributions / earlier)
            else:
                part.observe(shared / earlier, slot, contributions * part.size / self.size)
            earlier *= part.size

    def end_step(self, slot: Slot, *, observed: bool = False) -> list[GlobalStatistics]:
        return [statistics for part in self.parts for statistics in part.end_step(slot, observed=observed)]

    def in_flight(self) -> list[GlobalStatistics]:
        return [statistics for part in self.parts for statistics in part.in_flight()]

    def watch(self, slot: Slot, *, exact: bool) -> dict[str, Watch]:
        return {layer: seen for part in self.parts for layer, seen in part.watch(slot, exact=exact).items()}

    def state_dict(self) -> dict[str, Any]:
        return {str(index): part.state_dict() for index, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any], *, own: bool) -> None:
        for index, part in enumerate(self.parts):
            part.load_state_dict(state.get(str(index), {}), own=own)


@final
@dataclass(frozen=True)
class Chain(Policy):
    """``reduce = last(... first(payload))`` for statistics, in reverse order for cotangents."""

    parts: tuple[Policy, ...]

    def __init__(self, *parts: Policy) -> None:
        """Chain ``parts``; the first one is applied first.

        Raises:
            ValueError: fewer than two parts, or a part is not a policy.
        """
        if len(parts) < 2 or not all(isinstance(part, Policy) for part in parts):
            raise ValueError(f"Chain takes two or more policies, given {parts!r}.")
        object.__setattr__(self, "parts", parts)

    def __repr__(self) -> str:
        """Return the expression that creates it."""
        return f"Chain({', '.join(map(repr, self.parts))})"

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """Bind every part."""
        return _Sequence([part.bind(topology, layout) for part in self.parts])

    @property
    def facts(self) -> Facts:
        """Return the combined facts of all parts."""
        return in_sequence(*(part.facts for part in self.parts))

    @property
    def memory(self) -> str:
        """Return the memory of its parts."""
        return f"Chain({', '.join(part.memory for part in self.parts)})" if self.facts.keeps_cotangents else ""

    def stores(self, layout: Layout) -> Check:
        """Return the checks of its parts, by number."""
        checks = {str(index): part.stores(layout) for index, part in enumerate(self.parts)}
        kept = {str(index) for index, part in enumerate(self.parts) if part.memory}
        return fields({name: checks.pop(name) for name in sorted(kept)}, **checks)
