"""Bucket: one flat vector that carries what every layer shares in a step, and its journey to the other ranks.

Layout: the values of all slots, then one weight per slot, then the number of backward passes so far. It is fixed when
binding, so every rank sends the same size whatever its layers did; a slot that was not used has weight 0.
"""

from __future__ import annotations

import logging
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distnorm.kernels import windows
from distnorm.policies.stored import sizes_of
from distnorm.transport import Group
from distnorm.types import EVERY_LAYER, Direction, Future, Landed, Layout, Slot

logger = logging.getLogger("distnorm")


def loss_scale_of(slot: Slot, values: Tensor) -> Tensor | float:
    """What the ``values`` of ``slot`` are multiplied by: statistics by nothing. A tensor only if it is beside them."""
    scale = slot.loss_scale if slot.direction == "backward" else 1.0
    return float(scale) if isinstance(scale, Tensor) and scale.device != values.device else scale


def moved(values: Tensor, device: torch.device) -> Tensor:
    """``values`` on ``device``; zeros in place of those of a meta tensor, which has none."""
    return torch.zeros_like(values, device=device) if values.is_meta else values.to(device)


class _InFlight(NamedTuple):
    """The sum of a step's vector; ``passes`` is what this rank sent along, None if another process sent it."""

    sum: Future
    step: int
    passes: int | None


# docs/decisions.md#an-asynchronous-sum-gets-one-whole-step
class Bucket:
    """Collects slots during a step and sums them over a group while the next step runs."""

    def __init__(self, layout: Layout, group: Group, *, extra: int = 0) -> None:
        """Room for ``layout``, with ``extra`` more values per forward slot, behind the others."""
        self.group = group
        self._extra = extra
        self.index = {slot: number for number, slot in enumerate(layout.sizes)}
        sizes = sizes_of(layout, extra)
        self._starts = starts = list(accumulate(sizes, initial=0))
        self.span = {slot: slice(*starts[number : number + 2]) for slot, number in self.index.items()}
        self.values = starts[-1]
        self.slots = len(sizes)
        self._sizes = sizes
        self.layout = self._lay_out(layout.device)
        self.outbox = torch.zeros(self.values + self.slots + 1, dtype=torch.float64, device=layout.device)
        self.dropped = torch.zeros(self.slots, dtype=torch.int64, device=layout.device)
        """How often each slot came back with NaN or Inf and was left out."""
        self.last = torch.zeros_like(self.outbox)
        """This rank's part of the last step."""
        self._pending: _InFlight | None = None
        self._warned: set[str] = set()

    def _lay_out(self, device: torch.device) -> windows.Slots:
        # Made on the CPU, whatever the default device is: one copy, and no waiting for a GPU.
        starts, sizes = torch.tensor(self._starts, device="cpu"), torch.tensor(self._sizes, device="cpu")
        slot_of = torch.repeat_interleave(sizes, output_size=self.values)
        return windows.Slots(starts.to(device), slot_of.to(device))

    def to(self, device: torch.device) -> None:
        """Go on there. Waits for the vector in flight."""
        self.layout = self._lay_out(device)
        landed = self._wait()
        if landed is not None and self._pending is not None:
            self._pending = self._pending._replace(sum=Future.completed(moved(landed, device)))
        if self.outbox.is_meta:
            self._pending = None  # it carried nothing
        self.outbox, self.dropped, self.last = (moved(each, device) for each in (self.outbox, self.dropped, self.last))

    def write(self, layer: str, direction: Direction, values: Tensor, weight: Tensor | float) -> None:
        """Add to a slot of this step."""
        key = layer, direction
        windows.add(self.outbox, self.span[key], self.values + self.index[key], values, weight)

    def in_flight(self) -> Tensor | None:
        """The sum that is under way, if any, waited for; None where ranks are out of phase, and it may never come."""
        return None if "phase" in self._warned else self._wait()

    def exchange(self, slot: Slot) -> tuple[Tensor | None, Tensor]:
        """End a step: wait for the last one's sum, and send this one's. Returns that sum, if any, and what was sent.

        What is interrupted before this step's vector has been sent has changed nothing, and can be repeated.
        """
        landed = self._wait()
        if landed is not None and self._pending is not None and self._pending.passes is not None:
            self._check_phase(landed, self._pending.passes)
        travelling = self.outbox.clone()
        travelling[-1].fill_(slot.passes)  # to assign a number copies it to a GPU, which waits
        try:
            started = self.group.sum_async(travelling, slot._replace(layer=EVERY_LAYER))
            self._pending = _InFlight(started, slot.step, slot.passes)
        except RuntimeError as error:
            raise self._missed(slot.step, error) from error
        return landed, self.take()

    def land(self) -> Tensor | None:
        """The sum that is under way, if any, waited for and under way no more."""
        landed, self._pending = self._wait(), None
        return landed

    def _wait(self) -> Tensor | None:
        if self._pending is None:
            return None
        try:
            return self._pending.sum.wait()
        except RuntimeError as error:
            raise self._missed(self._pending.step, error) from error

    def _missed(self, step: int, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"distnorm: moving statistics of step {step} among ranks {list(self.group.ranks)} did not arrive. Some "
            "rank has stopped, or ran out of data earlier: end all ranks after equally many steps. "
            f"Cause: {error}"
        )

    def take(self) -> Tensor:
        """End a step whose sums need no collective: this step's vector.

        A copy: replayed CUDA graphs go on writing where they wrote when they were captured.
        """
        self.last = self.outbox.clone()
        self.outbox.zero_()
        return self.last

    def landed(self, means: Tensor, weights: Tensor, usable: Tensor) -> list[Landed]:
        """What the running statistics shall absorb: the forward slots of these vectors."""
        rows = zip(self.index, means.split(self._sizes), weights.unbind(), usable.double().unbind(), strict=True)
        return [
            Landed(layer, values[: len(values) - self._extra], *rest)
            for (layer, direction), values, *rest in rows
            if direction == "forward"
        ]

    def statistics(self, means: Tensor) -> dict[str, Tensor]:
        """By layer, what ``means`` of all slots hold of its forward one."""
        spans = {layer: span for (layer, direction), span in self.span.items() if direction == "forward"}
        return {layer: means[span.start : span.stop - self._extra] for layer, span in spans.items()}

    def _check_phase(self, landed: Tensor, passes: int) -> None:
        if landed.device.type == "cpu" and landed[-1].item() != passes * self.group.size:
            self.warn_once(
                "phase",
                f"distnorm: ranks {list(self.group.ranks)} end their steps at different times, so moving statistics "
                "mix steps. A backward pass on some rank reached no converted layer, or ranks run different numbers of "
                "backward passes. Let the optimizer end the steps: distnorm.attach(model, optimizer=optimizer).",
            )

    def warn_once(self, about: str, message: str) -> None:
        """Log ``message`` the first time that it is ``about`` this."""
        if about not in self._warned:
            self._warned.add(about)
            logger.warning(message)

    def warn_of_drops(self) -> None:
        """Log once, naming the layers, that values were dropped. Waits for the device."""
        if self.dropped.is_meta:
            return
        dropped = self.dropped.tolist()
        lost = [f"{layer} ({direction})" for (layer, direction), n in self.index.items() if dropped[n] > 0]
        if lost:
            self.warn_once("drops", f"distnorm: NaN or Inf from some rank; those steps were left out for {lost}.")

    def state_dict(self) -> dict[str, Any]:
        """Waits for the vector in flight and stores it as in flight: saving does not change the trajectory."""
        state: dict[str, Any] = {"outbox": self.outbox.clone(), "dropped": self.dropped.clone()}
        in_flight = self._wait()
        if in_flight is not None:
            state["in_flight"] = in_flight.clone()
            state["in_flight"][-1] = 0  # of this process alone
        return state

    def load_state_dict(self, state: dict[str, Any], *, own: bool) -> None:
        """Resume; the outbox is this rank's only if ``own``."""
        self.dropped.copy_(state["dropped"])
        self.outbox.zero_()
        if own:
            self.outbox.copy_(state["outbox"])
        in_flight = state.get("in_flight")
        self._pending = None
        if in_flight is not None:
            vector = in_flight.to(self.outbox.device, copy=True)
            self._pending = _InFlight(Future.completed(vector), -1, None)
