"""Moving: a window of steps instead of a larger batch; one asynchronous collective per step for the whole model.

Timeline with staleness 1: forward and backward of step t use the completed entries up to t - 2 and the local values of
t. At the end of step t the sums of t - 1 have completed, and those of t are sent. With staleness 0 the newest entry is
shared too, by one blocking collective per layer and direction. docs/moving.md derives the scaling. The window is due to
Yan et al., "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization", ICLR 2020. Sharing it
across ranks is our construction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, final

import torch
from torch import Tensor

from distnorm.compat.uninterrupted import Call
from distnorm.kernels import windows
from distnorm.policies.base import Policy, Reducer
from distnorm.policies.bucket import key_of, loss_scale_of
from distnorm.policies.entries import WindowReducer
from distnorm.policies.facts import Completeness, Facts
from distnorm.policies.stored import Check, bucket, entries, fields, sizes_of
from distnorm.transport import Group, Topology
from distnorm.types import GlobalStatistics, Layout, Slot, Watch
from distnorm.validation import Axis, Staleness, Window, check_fields

LossReduction = Literal["mean", "sum"]


class _Window(WindowReducer):
    def __init__(self, policy: Moving, groups: tuple[Group, Group], layout: Layout) -> None:
        # The newest entry enters the ring only once it is global: the window is the ring and the newest entry.
        super().__init__(policy.facts, groups, layout, depth=policy.window - 1)
        self.policy = policy

    def reduce(self, payload: Tensor, slot: Slot) -> Tensor:
        if not slot.learning:
            return self.blocking.sum(payload, slot)
        self.follow(payload)
        if slot.direction == "backward":
            return self._enter(*self._cotangents(payload, slot), slot)
        return self._enter(payload if self.policy.staleness else self.blocking.sum(payload, slot), None, slot)

    def _cotangents(self, payload: Tensor, slot: Slot) -> tuple[Tensor, Tensor | None]:
        """Return the newest cotangents, of this rank or of a blocking sum, and their weight, None for 1."""
        count = _count(slot) if self.policy.loss_reduction == "sum" else None
        if self.policy.staleness:
            return payload, count
        weight = payload.new_ones(1) if count is None else (count / self.size).view(1)
        newest = self.blocking.sum(torch.cat((payload, weight)), slot)
        return newest[:-1], newest[-1]

    def _enter(self, newest: Tensor, weight: Tensor | None, slot: Slot) -> Tensor:
        """Add ``newest`` to the vector of this step. Return ``weight`` times the mean over the window.

        Statistics have their count, which is their weight, as last value, in the argument and in the result. The
        weight of cotangents is 1 if None.
        """
        key = key_of(slot)
        return windows.window(
            *(newest, weight, loss_scale_of(slot, newest), self.entries.sums, self.entries.filled, self.bucket.outbox),
            *(self.bucket.span[key], self.bucket.index[key]),
            counted=slot.direction == "forward",
        )

    def completeness(self, slot: Slot) -> Completeness:
        found = super().completeness(slot)
        return found if self.policy.staleness else found._replace(is_global=True)

    def observe(self, shared: Tensor, slot: Slot, contributions: float) -> None:
        self.follow(shared)
        if slot.direction == "forward":
            self.bucket.write(slot, shared[:-1], shared[-1])
            return
        weight = _count(slot) if self.policy.loss_reduction == "sum" else float(contributions)
        self.bucket.write(slot, shared / loss_scale_of(slot, shared), weight)

    def end_step(self, slot: Slot, *, observed: bool = False) -> list[GlobalStatistics]:
        if observed or self.policy.staleness == 0:
            # The vector was sent before a state with a longer warm-up was loaded.
            statistics = self._global_statistics(self.bucket.complete(slot, self._entering))
            return self.bucket.take(slot, self._entering, statistics)
        return self._global_statistics(self.bucket.exchange(slot, self._entering))

    def _entering(self, completed: Tensor | None, _: Tensor | None) -> list[Call]:
        return [] if completed is None else self.entries.pushing(completed)

    def _global_statistics(self, completed: Tensor | None) -> list[GlobalStatistics]:
        if completed is None:
            return []
        weights = self.bucket.layout.parts(completed)[1]
        # A window of one keeps no entry: the completed sum is the whole mean.
        shared = self.entries.mean() if self.entries.depth else self.bucket.layout.means(completed)
        return self.bucket.global_statistics(shared, weights, self.entries.usable)

    def in_flight(self) -> list[GlobalStatistics]:
        completed = self.bucket.in_flight()
        if completed is None:
            return []
        usable = self.bucket.layout.judge(completed)[1]
        means = self.bucket.layout.means(completed)
        shared = self.entries.mean_after(means, usable) if self.entries.depth else means
        return self.bucket.global_statistics(shared, self.bucket.layout.parts(completed)[1], usable)

    def watch(self, slot: Slot, *, exact: bool) -> dict[str, Watch]:
        local = self.bucket.layout.means(self.bucket.last)
        shared = self.bucket.layout.means(self.blocking.sum(self.bucket.last, slot)) if exact else None
        return self.watches(local, self.entries.mean(), shared)

    def state_dict(self) -> dict[str, Any]:
        self.bucket.warn_of_drops()
        return {"window": self.entries.state_dict(), "bucket": self.bucket.state_dict()}

    def load_state_dict(self, state: dict[str, Any], *, own: bool) -> None:
        self.entries.load_state_dict(state["window"])
        self.bucket.load_state_dict(state["bucket"], own=own)


def _count(slot: Slot) -> Tensor:
    assert slot.forward_count is not None, "cotangents come with the count of their forward"
    return slot.forward_count


@final
@dataclass(frozen=True, kw_only=True)
class Moving(Policy):
    """Average statistics and cotangents over the ``window`` newest steps of all ranks.

    With staleness 1 the newest step is this rank's only.

    Args:
        window: steps, the newest included. 1 with staleness 0 is exact synchronization.
        staleness: 1 sends the sums of each step while the next step runs; 0 blocks in every layer.
        axis: share along this axis only, as ``AllReduce(axis=...)``; None for all data-parallel ranks.
        loss_reduction: whether the loss of each rank is a ``"mean"`` or a ``"sum"`` over its batch.

    Training-mode forwards under ``no_grad`` share synchronously and do not change the window.
    """

    window: Window = 16
    staleness: Staleness = 1
    axis: Axis | None = None
    loss_reduction: LossReduction = "mean"

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """Create one group for blocking sums and one for the bucket."""
        return _Window(self, topology.pair(self.axis), layout)

    @property
    def facts(self) -> Facts:
        """Return the facts of one collective, blocking or not. The window holds cotangents of several steps."""
        return Facts(
            collectives=1.0 - self.staleness,
            background=float(self.staleness),
            staleness=self.staleness,
            always_global=self.staleness == 0,
            keeps_cotangents=True,
        )

    @property
    def memory(self) -> str:
        """Return the description with a window of 1: a state can be loaded into a window of any size."""
        return repr(replace(self, window=1))

    def stores(self, layout: Layout) -> Check:
        """Return the check of a window of any size, and of a bucket."""
        sizes = sizes_of(layout)
        return fields({"window": entries(len(sizes), sum(sizes)), "bucket": bucket(len(sizes), sum(sizes))})
