"""StaleMix: the other ranks' newest completed steps and this rank's current one; one asynchronous collective per step.

Timeline: as ``Moving`` with staleness 1. In step t the other ranks are represented by their mean over the ``window``
steps up to t - 2. This mean has the weight of one rank, whatever the number of ranks (docs/moving.md). The policy is
our own construction, after the displaced statistics of Li et al., "DistriFusion", CVPR 2024, in the form that suits
independent batches.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from distnorm.compat.uninterrupted import Call, put
from distnorm.kernels import windows
from distnorm.policies.base import Policy, Reducer
from distnorm.policies.bucket import key_of, loss_scale_of, moved
from distnorm.policies.entries import WindowReducer
from distnorm.policies.facts import Facts
from distnorm.policies.stored import Check, array, bucket, entries, fields, sizes_of
from distnorm.transport import Group, Topology
from distnorm.types import GlobalStatistics, Layout, Slot, Watch
from distnorm.validation import Axis, Window, check_fields


class _Mix(WindowReducer):
    def __init__(self, policy: StaleMix, groups: tuple[Group, Group], layout: Layout) -> None:
        # Counts are values here, to be mixed like sums; weights count contributions.
        super().__init__(policy.facts, groups, layout, depth=policy.window, extra=1)
        self.others = torch.zeros_like(self.entries.sums)
        """Per slot, the mean contribution of one other rank; 0 until a sum has completed."""
        self._sent: Tensor | None = None

    def reduce(self, payload: Tensor, slot: Slot) -> Tensor:
        if not slot.learning:
            return self.blocking.sum(payload, slot)
        self.follow(payload)
        key = key_of(slot)
        place = self.bucket.outbox, self.bucket.span[key], self.bucket.index[key]
        return windows.mix(payload, loss_scale_of(slot, payload), self.others, *place)

    def observe(self, shared: Tensor, slot: Slot, contributions: float) -> None:
        self.follow(shared)
        self.bucket.write(slot, shared / loss_scale_of(slot, shared), float(contributions))

    def end_step(self, slot: Slot, *, observed: bool = False) -> list[GlobalStatistics]:
        if observed:
            # What was sent before a state was loaded into a longer warm-up.
            statistics = self._global_statistics(self.bucket.complete(slot, self._entering))
            # Another policy has shared this step: what one rank contributes on average is known without a collective.
            statistics = self.bucket.take(slot, self._entering, statistics)
        else:
            statistics = self._global_statistics(self.bucket.exchange(slot, self._entering))
        self.entries.mean(out=self.others)  # in place, as ``Bucket.exchange`` says
        return statistics

    def _entering(self, completed: Tensor | None, sent: Tensor | None) -> list[Call]:
        """Record the completed sum less this rank's own part, as the contribution of the other ranks."""
        own = self._sent
        noted = put(self, "_sent", sent)
        return (
            [noted]
            if completed is None
            else [noted, *self.entries.pushing(completed if own is None else completed - own)]
        )

    def in_flight(self) -> list[GlobalStatistics]:
        return self._global_statistics(self.bucket.in_flight())

    def _global_statistics(self, vector: Tensor | None) -> list[GlobalStatistics]:
        """Return the updates of all slots. A forward slot ends with its count."""
        if vector is None:
            return []
        values, usable = self.bucket.layout.parts(vector)[0], self.bucket.layout.judge(vector)[1]
        means, counts = self._means(values)
        return self.bucket.global_statistics(means, counts, usable & (counts > 0))

    def _means(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means of all slots, each divided by its last value, the count; and the counts."""
        counts = sums[self.bucket.layout.starts[1:] - 1]
        return sums / counts.clamp_min(1)[self.bucket.layout.slot_of], counts

    def watch(self, slot: Slot, *, exact: bool) -> dict[str, Watch]:
        last, _ = self.bucket.layout.parts(self.bucket.last)
        total = self.bucket.layout.parts(self.blocking.sum(self.bucket.last, slot))[0] if exact else None
        shared = None if total is None else self._means(total)[0]
        return self.watches(self._means(last)[0], self._means(last + self.others)[0], shared)

    def move(self, device: torch.device) -> None:
        self.others = moved(self.others, device)
        self._sent = None if self._sent is None else moved(self._sent, device)
        super().move(device)

    def state_dict(self) -> dict[str, Any]:
        self.bucket.warn_of_drops()
        state = {"others": self.entries.state_dict(), "bucket": self.bucket.state_dict()}
        return state if self._sent is None else {**state, "sent": self._sent.clone()}

    def load_state_dict(self, state: dict[str, Any], *, own: bool) -> None:
        self.bucket.load_state_dict(state["bucket"], own=own)
        others = state["others"]
        self.entries.load_state_dict(self._one_entry(others) if isinstance(others, Tensor) else others)
        self.entries.mean(out=self.others)
        self._sent = state["sent"].to(self.others.device) if own and "sent" in state else None

    def _one_entry(self, others: Tensor) -> dict[str, Tensor]:
        """Convert a state without a version, which holds one completed step's mean contribution, to entries."""
        filled = torch.zeros_like(self.bucket.dropped, device=others.device)
        filled.index_add_(0, self.bucket.layout.slot_of.to(others.device), (others != 0).long()).clamp_max_(1)
        return {"ring": others[None], "filled": filled, "position": torch.zeros_like(filled)}


@final
@dataclass(frozen=True, kw_only=True)
class StaleMix(Policy):
    """``reduce(payload) = own payload + the mean contribution of one other rank to the completed steps``.

    Args:
        window: the number of completed steps to average over, the newest ones.
        axis: share along this axis only, as ``AllReduce(axis=...)``; None for all data-parallel ranks.

    Training-mode forwards under ``no_grad`` share synchronously.
    """

    window: Window = 1
    axis: Axis | None = None

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """Create one group for blocking sums and one for the bucket."""
        return _Mix(self, topology.pair(self.axis), layout)

    @property
    def facts(self) -> Facts:
        """Return the facts of one asynchronous collective. Cotangents of an earlier step are used."""
        return Facts(background=1.0, staleness=1, always_global=False, keeps_cotangents=True)

    @property
    def memory(self) -> str:
        """Return the description with a window of 1: a state can be loaded into a window of any size."""
        return repr(replace(self, window=1))

    def stores(self, layout: Layout) -> Check:
        """Return the check of any number of entries, or the one of a state without a version, and of a bucket."""
        slots, values = len(layout.sizes), sum(sizes_of(layout, extra=1))
        ring, one = entries(slots, values), array(values)

        def others(where: str, given: object) -> None:
            (one if isinstance(given, Tensor) else ring)(where, given)

        return fields({"others": others, "bucket": bucket(slots, values)}, sent=array(values + slots + 1))
