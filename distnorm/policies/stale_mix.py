"""StaleMix: the other ranks' newest landed steps and this rank's current one; one asynchronous collective per step.

Timeline: as ``Moving`` with staleness 1: in step t the other ranks are represented by their mean over the ``window``
steps up to t - 2, and weigh as much as this rank, however many they are (docs/moving.md). Our own
construction, after the displaced statistics of Li et al., "DistriFusion", CVPR 2024, in the form that suits independent
batches.
"""

from __future__ import annotations

from ctypes import CDLL
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from distnorm.compat.at_once import Call, put
from distnorm.kernels.native import library
from distnorm.policies.base import Policy, Reducer
from distnorm.policies.bucket import DOUBLE, Bucket, at_or_number, loss_scale_of
from distnorm.policies.entries import Entries, Remembering
from distnorm.policies.facts import Facts
from distnorm.policies.routes import Routes
from distnorm.policies.stored import Check, array, bucket, entries, fields, sizes_of
from distnorm.transport import Group, Topology
from distnorm.transport.pending import moved
from distnorm.types import Landed, Layout, Slot, Watch
from distnorm.validation import Axis, Window, check_fields


class _Mix(Remembering):
    late = True

    def __init__(self, window: int, blocking: Group, background: Group, layout: Layout) -> None:
        super().__init__(blocking.size)
        self.blocking = blocking
        # Counts are values here, to be mixed like sums; weights count contributions.
        self.bucket = Bucket(layout, background, extra=1)
        self.entries = Entries(self.bucket, window)
        self.others = torch.zeros_like(self.entries.sums)
        """Per slot, what one other rank contributes on average; 0 before anything landed."""
        self._sent: Tensor | None = None

    def routes(self) -> Routes:
        return [(self.blocking.ranks,)]

    def reduce(self, wire: Tensor, slot: Slot) -> Tensor:
        if not slot.learning:
            return self.blocking.sum(wire, slot)
        self.follow(wire)
        if self.bucket.in_triton(wire):
            return self._mix_in_triton(wire, slot)
        compiled = library() if wire.is_cpu and wire.is_contiguous() else None
        if compiled is not None:
            return self._mix_in_c(compiled, wire, slot)
        scale = loss_scale_of(slot, wire)
        self.bucket.write(slot.layer, slot.direction, wire / scale, 1.0)
        return wire + scale * self.others[self.bucket.span[slot.layer, slot.direction]]

    def _mix_in_triton(self, wire: Tensor, slot: Slot) -> Tensor:
        from distnorm.kernels.gpu.entries import mix  # imports Triton

        key = slot.layer, slot.direction
        place = self.others, self.bucket.outbox, self.bucket.span[key].start, self.bucket.index[key]
        out: Tensor = mix(wire.contiguous(), *at_or_number(loss_scale_of(slot, wire)), *place)
        return out

    def _mix_in_c(self, compiled: CDLL, wire: Tensor, slot: Slot) -> Tensor:
        key, scale = (slot.layer, slot.direction), float(loss_scale_of(slot, wire))
        others = self.others.data_ptr() + DOUBLE * self.bucket.span[key].start
        out = torch.empty_like(wire)
        compiled.entries_mix(
            *(wire.data_ptr(), wire.numel(), scale, 1.0, scale),
            *(others, *self.bucket.addresses(key), out.data_ptr()),
        )
        return out

    def lands(self, slot: Slot) -> bool:
        return not slot.learning

    def counts(self, slot: Slot) -> bool:
        return not slot.learning

    def observe(self, shared: Tensor, slot: Slot, contributions: float) -> None:
        self.follow(shared)
        self.bucket.write(slot.layer, slot.direction, shared / loss_scale_of(slot, shared), float(contributions))

    def end_step(self, slot: Slot, *, observed: bool = False) -> list[Landed]:
        if observed:
            # What was sent before a state was loaded into a longer warm-up.
            landed = self._landed(self.bucket.land(slot, self._entering))
            # Another policy has shared this step: what one rank contributes on average is known without a collective.
            landed = self.bucket.take(slot, self._entering, landed)
        else:
            landed = self._landed(self.bucket.exchange(slot, self._entering))
        self.entries.mean(out=self.others)  # in place, as ``Bucket.exchange`` says
        return landed

    def _entering(self, landed: Tensor | None, sent: Tensor | None) -> list[Call]:
        """Let what landed, less what this rank had sent, speak for the other ranks."""
        own = self._sent
        noted = put(self, "_sent", sent)
        return [noted] if landed is None else [noted, *self.entries.pushing(landed if own is None else landed - own)]

    def in_flight(self) -> list[Landed]:
        return self._landed(self.bucket.in_flight())

    def _landed(self, vector: Tensor | None) -> list[Landed]:
        """Of all slots at once, of which the forward ones end with their counts."""
        if vector is None:
            return []
        values, usable = self.bucket.parts(vector)[0], self.bucket.judge(vector)[1]
        counts = values[self.bucket.starts[1:] - 1]
        means = values / counts.clamp_min(1)[self.bucket.slot_of]
        landed = self.bucket.landed(means, counts, usable & (counts > 0))
        return [each._replace(means=each.means[:-1]) for each in landed]

    def watch(self, slot: Slot, *, exact: bool) -> dict[str, Watch]:
        last, _ = self.bucket.parts(self.bucket.last)
        total = self.bucket.parts(self.blocking.sum(self.bucket.last, slot))[0] if exact else None
        used = last + self.others
        found = {}
        for (layer, direction), number in self.bucket.index.items():
            if direction == "forward":
                span = self.bucket.span[layer, direction]
                shared = None if total is None else _mean(total[span])
                entries, dropped = int(self.entries.filled[number]), int(self.bucket.dropped[number])
                found[layer] = Watch(_mean(last[span]), _mean(used[span]), shared, entries, dropped)
        return found

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
        """As entries, what states without a version hold: what one other rank contributed to the last landed step."""
        filled = torch.zeros_like(self.bucket.dropped, device=others.device)
        filled.index_add_(0, self.bucket.slot_of.to(others.device), (others != 0).long()).clamp_max_(1)
        return {"ring": others[None], "filled": filled, "position": torch.zeros_like(filled)}


def _mean(wire: Tensor) -> Tensor:
    return wire[:-1] / wire[-1].clamp_min(1)


@final
@dataclass(frozen=True, kw_only=True)
class StaleMix(Policy):
    """``reduce(wire) = own wire + what one other rank contributed on average to the landed steps``.

    Args:
        window: how many of them, the newest ones.
        axis: share along this axis only, as ``AllReduce(axis=...)``; None for all data-parallel ranks.

    Training-mode forwards under ``no_grad`` share synchronously.
    """

    window: Window = 1
    axis: Axis | None = None

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """Make one group for blocking sums and one for the bucket."""
        blocking, background = topology.pair(self.axis)
        return _Mix(self.window, blocking, background, layout)

    @property
    def facts(self) -> Facts:
        """One asynchronous collective; cotangents of an earlier step come back."""
        return Facts(background=1.0, staleness=1, always_lands=False, keeps_cotangents=True)

    @property
    def memory(self) -> str:
        """Entries mean the same in a window of any size."""
        return repr(replace(self, window=1))

    def stores(self, layout: Layout) -> Check:
        """Entries of any number, or the one that states without a version hold; and a bucket."""
        slots, values = len(layout.sizes), sum(sizes_of(layout, extra=1))
        ring, one = entries(slots, values), array(values)

        def others(where: str, given: object) -> None:
            (one if isinstance(given, Tensor) else ring)(where, given)

        return fields({"others": others, "bucket": bucket(slots, values)}, sent=array(values + slots + 1))
