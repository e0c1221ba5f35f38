"""Entries: what landed in the newest steps, for each slot of a bucket, and the sum of it.

An entry is a landed value over its weight. Slots go on by themselves: one that was not used, or came back with NaN or
Inf, keeps the entries that it has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distnorm.compat.at_once import Call, at_once, put
from distnorm.kernels import windows
from distnorm.policies.base import Reducer
from distnorm.policies.bucket import Bucket, moved
from distnorm.policies.facts import Completeness, Facts
from distnorm.transport import Group
from distnorm.types import Layout, Slot, Watch

_STORED = ("ring", "filled", "position")


# docs/decisions.md#state-moves-with-the-values
class Entries:
    """Up to ``depth`` entries for each slot of ``bucket``."""

    def __init__(self, bucket: Bucket, depth: int) -> None:
        self.bucket = bucket
        self.depth = depth
        device = bucket.outbox.device
        self.ring = torch.zeros(depth, bucket.values, dtype=torch.float64, device=device)
        self.filled = torch.zeros(bucket.slots, dtype=torch.int64, device=device)
        """How many entries each slot has."""
        self.position = torch.zeros_like(self.filled)
        """The row of each slot's next entry."""
        self.sums = torch.zeros(bucket.values, dtype=torch.float64, device=device)
        self.usable = torch.zeros(bucket.slots, dtype=torch.bool, device=device)
        """Which slots the last vector had an entry for."""

    def pushing(self, vector: Tensor) -> list[Call]:
        """What, done at once, makes an entry of each ``usable`` slot of ``vector``; counts those not finite."""
        ring = self.ring, self.filled, self.position, self.sums
        calls, usable, position = windows.pushing(vector, self.bucket.layout, *ring, self.bucket.dropped)
        return [*calls, put(self, "usable", usable), put(self, "position", position)]

    def mean(self, out: Tensor | None = None) -> Tensor:
        """Of the entries of each slot; 0 where there is none. In ``out``, if it is given."""
        return torch.div(self.sums, self.filled[self.bucket.layout.slot_of].clamp_min(1), out=out)

    def mean_after(self, entry: Tensor, usable: Tensor) -> Tensor:
        """What ``mean`` would be with ``entry`` pushed into the ``usable`` slots."""
        slot_of = self.bucket.layout.slot_of
        oldest = self.ring[self.position[slot_of], torch.arange(self.bucket.values, device=slot_of.device)]
        sums = self.sums + torch.where(usable[slot_of], entry - oldest, 0.0)
        return sums / (self.filled + usable).clamp_max(self.depth)[slot_of].clamp_min(1)

    def to(self, device: torch.device) -> None:
        """Go on there."""
        for name in (*_STORED, "sums"):
            setattr(self, name, moved(getattr(self, name), device))

    def state_dict(self) -> dict[str, Any]:
        """All but the sum."""
        return {name: getattr(self, name).clone() for name in _STORED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume, from another number of entries than ``depth`` with the newest ones that there are and fit."""
        kept = state if len(state["ring"]) == self.depth else self._newest(**state)
        for name in _STORED:
            getattr(self, name).copy_(kept[name])
        at_once(*windows.summing(self.ring, self.sums))

    def _newest(self, ring: Tensor, filled: Tensor, position: Tensor) -> dict[str, Tensor]:
        """Entries of another depth in rows of this one's, the oldest first."""
        slot_of, columns = self.bucket.layout.slot_of.to(ring.device), torch.arange(ring.shape[1], device=ring.device)
        kept = filled.clamp_max(self.depth)
        rows = ring.new_zeros(self.depth, ring.shape[1])
        for row in range(min(self.depth, len(ring))):
            source = (position - kept + row) % len(ring)
            rows[row] = torch.where((row < kept)[slot_of], ring[source[slot_of], columns], 0.0)
        return {"ring": rows, "filled": kept, "position": kept % max(self.depth, 1)}


class Remembering(Reducer):
    """A reducer with a bucket and entries, on the device of the layers: they follow when these move."""

    def __init__(
        self, facts: Facts, groups: tuple[Group, Group], layout: Layout, *, depth: int, extra: int = 0
    ) -> None:
        """``groups``: for blocking sums and for the bucket's, of the same ranks."""
        self.blocking, background = groups
        super().__init__(self.blocking.size, facts.along([(self.blocking.ranks,)]))
        self.bucket = Bucket(layout, background, extra=extra)
        self.entries = Entries(self.bucket, depth)

    def completeness(self, slot: Slot) -> Completeness:
        """Steps mix what is global with what is not; all else is summed at once."""
        return Completeness(not slot.learning, not slot.learning)

    def watches(self, local: Tensor, used: Tensor, shared: Tensor | None) -> dict[str, Watch]:
        """``watch``, of means of all slots."""
        local_of, used_of = self.bucket.statistics(local), self.bucket.statistics(used)
        shared_of = {} if shared is None else self.bucket.statistics(shared)
        found = {}
        for layer in local_of:
            number = self.bucket.index[layer, "forward"]
            entries, dropped = int(self.entries.filled[number]), int(self.bucket.dropped[number])
            found[layer] = Watch(local_of[layer], used_of[layer], shared_of.get(layer), entries, dropped)
        return found

    def follow(self, values: Tensor) -> None:
        """Go on where the ``values`` of a layer are now. Waits for the vector in flight, if that is elsewhere."""
        if values.device != self.bucket.outbox.device:
            with torch.inference_mode(False):
                self.move(values.device)

    def move(self, device: torch.device) -> None:
        """Go on there."""
        self.entries.to(device)
        self.bucket.to(device)  # in the end: it says where all is
