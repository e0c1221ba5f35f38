"""Entries: the completed sums of the newest steps, for each slot of a bucket, and their total.

An entry is a completed value divided by its weight. Slots advance independently: a slot that was not used, or whose
sum contains NaN or Inf, keeps its entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distnorm.compat.uninterrupted import Call, put, uninterrupted
from distnorm.kernels import windows
from distnorm.policies.base import Reducer
from distnorm.policies.bucket import Bucket, moved
from distnorm.policies.facts import Completeness, Facts
from distnorm.transport import Group
from distnorm.types import Layout, Slot, Watch, label

_GLOBAL, _LOCAL = Completeness(), Completeness(is_global=False, is_counted=False)
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
        """The number of entries of each slot."""
        self.position = torch.zeros_like(self.filled)
        """The row of the next entry of each slot."""
        self.sums = torch.zeros(bucket.values, dtype=torch.float64, device=device)
        self.usable = torch.zeros(bucket.slots, dtype=torch.bool, device=device)
        """Which slots of the last vector had an entry."""

    def pushing(self, vector: Tensor) -> list[Call]:
        """Return calls that append an entry per ``usable`` slot of ``vector``, and count the non-finite slots."""
        ring = self.ring, self.filled, self.position, self.sums
        calls, usable, position = windows.pushing(vector, self.bucket.layout, *ring, self.bucket.dropped)
        return [*calls, put(self, "usable", usable), put(self, "position", position)]

    def mean(self, out: Tensor | None = None) -> Tensor:
        """Return the mean over the entries of each slot, 0 where there are none; written to ``out``, if given."""
        return torch.div(self.sums, self.filled[self.bucket.layout.slot_of].clamp_min(1), out=out)

    def mean_after(self, entry: Tensor, usable: Tensor) -> Tensor:
        """Return what ``mean`` would be after pushing ``entry`` into the ``usable`` slots."""
        slot_of = self.bucket.layout.slot_of
        oldest = self.ring[self.position[slot_of], torch.arange(self.bucket.values, device=slot_of.device)]
        sums = self.sums + torch.where(usable[slot_of], entry - oldest, 0.0)
        return sums / (self.filled + usable).clamp_max(self.depth)[slot_of].clamp_min(1)

    def to(self, device: torch.device) -> None:
        """Move to ``device``."""
        for name in (*_STORED, "sums"):
            setattr(self, name, moved(getattr(self, name), device))

    def state_dict(self) -> dict[str, Any]:
        """Return all tensors but the total, which follows from them."""
        return {name: getattr(self, name).clone() for name in _STORED}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume. From a state of another ``depth``, keep the newest entries that fit."""
        kept = state if len(state["ring"]) == self.depth else self._newest(**state)
        for name in _STORED:
            getattr(self, name).copy_(kept[name])
        uninterrupted(*windows.summing(self.ring, self.sums))

    def _newest(self, ring: Tensor, filled: Tensor, position: Tensor) -> dict[str, Tensor]:
        """Arrange the entries of a state of another depth in rows of this one, the oldest first."""
        slot_of, columns = self.bucket.layout.slot_of.to(ring.device), torch.arange(ring.shape[1], device=ring.device)
        kept = filled.clamp_max(self.depth)
        rows = ring.new_zeros(self.depth, ring.shape[1])
        for row in range(min(self.depth, len(ring))):
            source = (position - kept + row) % len(ring)
            rows[row] = torch.where((row < kept)[slot_of], ring[source[slot_of], columns], 0.0)
        return {"ring": rows, "filled": kept, "position": kept % max(self.depth, 1)}


class WindowReducer(Reducer):
    """A reducer with a bucket and entries. They move to another device when the layers do."""

    def __init__(
        self, facts: Facts, groups: tuple[Group, Group], layout: Layout, *, depth: int, extra: int = 0
    ) -> None:
        """Create the buffers; ``groups``: one for blocking sums and one for the bucket, over the same ranks."""
        self.blocking, background = groups
        super().__init__(self.blocking.size, facts.along([(self.blocking.ranks,)]))
        self.bucket = Bucket(layout, background, extra=extra)
        self.entries = Entries(self.bucket, depth)

    def completeness(self, slot: Slot) -> Completeness:
        """Return that steps mix global and local values, and that forwards outside of steps are summed at once."""
        return _LOCAL if slot.learning else _GLOBAL

    def watches(self, local: Tensor, used: Tensor, shared: Tensor | None) -> dict[str, Watch]:
        """Return ``watch`` of the means of all slots."""
        local_of, used_of = self.bucket.statistics(local), self.bucket.statistics(used)
        shared_of = {} if shared is None else self.bucket.statistics(shared)
        found = {}
        numbers = {label(layer, name): n for (layer, where, name), n in self.bucket.index.items() if where == "forward"}
        for layer in local_of:
            number = numbers[layer]
            entries, dropped = int(self.entries.filled[number]), int(self.bucket.dropped[number])
            found[layer] = Watch(local_of[layer], used_of[layer], shared_of.get(layer), entries, dropped)
        return found

    def follow(self, values: Tensor) -> None:
        """Move to the device of ``values``, if a layer has moved. This waits for the vector in flight."""
        if values.device != self.bucket.outbox.device:
            with torch.inference_mode(False):
                self.move(values.device)

    def move(self, device: torch.device) -> None:
        """Move to ``device``."""
        self.entries.to(device)
        self.bucket.to(device)  # last: its device tells where all the others are
