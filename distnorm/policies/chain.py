"""Chain: one policy after the other.

Timeline: the collectives of its parts, in order; staleness of the stalest. ``Chain(AllReduce("local"),
AllReduce("node"))`` adds up within each node, then between nodes: the exact global sum, in two short hops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from distnorm.policies.base import Policy, Reducer
from distnorm.transport import Topology
from distnorm.types import Landed, Layout, Slot, Watch


class _Sequence(Reducer):
    def __init__(self, parts: list[Reducer]) -> None:
        super().__init__(math.prod(part.size for part in parts))
        self.parts = parts

    @property
    def alone(self) -> bool:
        return all(part.alone for part in self.parts)

    def reduce(self, wire: Tensor, slot: Slot) -> Tensor:
        # The adjoint of "first a, then b" is "first b, then a".
        for part in self.parts if slot.direction == "forward" else reversed(self.parts):
            wire = part.reduce(wire, slot)
        return wire

    def lands(self, slot: Slot) -> bool:
        return all(part.lands(slot) for part in self.parts)

    def counts(self, slot: Slot) -> bool:
        return all(part.counts(slot) for part in self.parts)

    def observe(self, shared: Tensor, slot: Slot, contributions: float) -> None:
        # What a part would have seen: statistics that earlier parts have summed, cotangents that later ones have.
        earlier = 1
        for part in self.parts:
            if slot.direction == "forward":
                part.observe(shared, slot, contributions / earlier)
            else:
                part.observe(shared / earlier, slot, contributions * part.size / self.size)
            earlier *= part.size

    def end_step(self, slot: Slot, *, observed: bool = False) -> list[Landed]:
        return [landed for part in self.parts for landed in part.end_step(slot, observed=observed)]

    def in_flight(self) -> list[Landed]:
        return [landed for part in self.parts for landed in part.in_flight()]

    def watch(self, slot: Slot, *, exact: bool) -> dict[str, Watch]:
        return {layer: seen for part in self.parts for layer, seen in part.watch(slot, exact=exact).items()}

    def state_dict(self) -> dict[str, Any]:
        return {str(index): part.state_dict() for index, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any], *, own: bool) -> None:
        for index, part in enumerate(self.parts):
            part.load_state_dict(state[str(index)], own=own)


@final
@dataclass(frozen=True)
class Chain(Policy):
    """``reduce = last(... first(wire))`` forward, and in reverse order for cotangents."""

    parts: tuple[Policy, ...]

    def __init__(self, *parts: Policy) -> None:
        """Chain ``parts``, the first one applied first.

        Raises:
            ValueError: fewer than two parts, or a part that is no policy.
        """
        if len(parts) < 2 or not all(isinstance(part, Policy) for part in parts):
            raise ValueError(f"Chain takes two or more policies, given {parts!r}.")
        object.__setattr__(self, "parts", parts)

    def __repr__(self) -> str:
        """As it is written."""
        return f"Chain({', '.join(map(repr, self.parts))})"

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """Bind every part."""
        return _Sequence([part.bind(topology, layout) for part in self.parts])

    @property
    def collectives(self) -> float:
        """Those of all parts together."""
        return sum(part.collectives for part in self.parts)

    @property
    def background(self) -> float:
        """Those of all parts together."""
        return sum(part.background for part in self.parts)

    @property
    def always_lands(self) -> bool:
        """If all parts do."""
        return all(part.always_lands for part in self.parts)

    @property
    def keeps_cotangents(self) -> bool:
        """If any part does."""
        return any(part.keeps_cotangents for part in self.parts)

    @property
    def staleness(self) -> int:
        """That of the stalest part."""
        return max(part.staleness for part in self.parts)
