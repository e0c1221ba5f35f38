"""Bucket: one flat vector with everything that the layers share in a step, and its asynchronous sum over ranks.

Layout: the values of all slots, then one weight per slot, then the number of backward passes so far. The layout is
fixed when binding, so every rank sends the same size whatever its layers did. A slot that was not used has weight 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distnorm.compat.uninterrupted import Call, put, uninterrupted
from distnorm.kernels import windows
from distnorm.policies.stored import sizes_of
from distnorm.transport import Group
from distnorm.types import EVERY_LAYER, Direction, Future, GlobalStatistics, Layout, Slot, label

logger = logging.getLogger("distnorm")


def loss_scale_of(slot: Slot, values: Tensor) -> Tensor | float:
    """Return the factor in the ``values`` of ``slot``, 1 for statistics; a tensor only if it is on their device."""
    scale = slot.loss_scale if slot.direction == "backward" else 1.0
    return float(scale) if isinstance(scale, Tensor) and scale.device != values.device else scale


def key_of(slot: Slot) -> tuple[str, Direction, str]:
    """Return what identifies the payload of ``slot`` in a ``Layout``."""
    return slot.layer, slot.direction, slot.name


def moved(values: Tensor, device: torch.device) -> Tensor:
    """Return ``values`` on ``device``; zeros for a meta tensor, which has no values."""
    return torch.zeros_like(values, device=device) if values.is_meta else values.to(device)


class _InFlight(NamedTuple):
    """The sum of a step's vector; ``passes`` is the number that this rank sent, None if another process sent it."""

    sum: Future
    step: int
    passes: int | None


Enter = Callable[[Tensor | None, Tensor | None], list[Call]]
"""How a policy records the completed sum, if any, and the vector that is sent: calls that run without interruption."""


# docs/decisions.md#an-asynchronous-sum-gets-one-whole-step
class Bucket:
    """Collect the slots of a step, and sum them over a group while the next step runs."""

    def __init__(self, layout: Layout, group: Group, *, extra: int = 0) -> None:
        """Allocate room for ``layout``, with ``extra`` more values at the end of each forward slot."""
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
        """The number of sums per slot that contained NaN or Inf and were left out."""
        self.last = torch.zeros_like(self.outbox)
        """The contribution of this rank to the last step."""
        self._pending: _InFlight | None = None
        self._reached: Slot | None = None
        self._ended: Slot | None = None
        """The last steps that received values and that ended; compared by identity, since a state may be loaded."""
        self._completed: Tensor | None = None
        self._result: list[GlobalStatistics] = []
        self._warned: set[str] = set()

    def _lay_out(self, device: torch.device) -> windows.Slots:
        # Made on the CPU, whatever the default device is: one copy, and the host does not wait for a GPU.
        starts, sizes = (torch.tensor(each, dtype=torch.int64, device="cpu") for each in (self._starts, self._sizes))
        slot_of = torch.repeat_interleave(sizes, output_size=self.values)
        return windows.Slots(starts.to(device), slot_of.to(device))

    def to(self, device: torch.device) -> None:
        """Move to ``device``. Waits for the vector in flight."""
        self.layout = self._lay_out(device)
        completed = self._wait()
        if completed is not None and self._pending is not None:
            self._pending = self._pending._replace(sum=Future.completed(moved(completed, device)))
        if self.outbox.is_meta:
            self._pending = None  # it contained nothing
        self.dropped, self.last = moved(self.dropped, device), moved(self.last, device)
        self.outbox = moved(self.outbox, device)  # last: ``follow`` compares with its device

    def write(self, slot: Slot, values: Tensor, weight: Tensor | float) -> None:
        """Add to a slot of this step."""
        key = key_of(slot)
        windows.add(self.outbox, self.span[key], self.values + self.index[key], values, weight)

    def in_flight(self) -> Tensor | None:
        """Wait for the sum in flight and return it, if any; None if ranks are out of phase and it may not complete."""
        return None if "phase" in self._warned else self._wait()

    def exchange(self, slot: Slot, enter: Enter) -> Tensor | None:
        """End the step of ``slot``: wait for the last step's sum, send this one's. Return the completed sum, if any.

        An exception from outside, such as Ctrl-C, leaves one of two states: nothing was sent, or everything was sent
        and recorded. A second call with the same ``slot`` does not end the step again and returns the same result.
        """
        if self._ended is slot:
            return self._completed
        completed = self._wait()
        if completed is not None and self._pending is not None and self._pending.passes is not None:
            self._check_phase(completed, self._pending.passes)
        sent, own = self.outbox.clone(), self.outbox.clone()
        sent[-1].fill_(slot.passes)  # assigning a number would copy it to a GPU, and the host would wait
        calls = [
            *self._start_next(own),
            *enter(completed, own),
            put(self, "_completed", completed),
            put(self, "_ended", slot),
        ]

        def note(sum_: Future) -> list[Call]:
            return [put(self, "_pending", _InFlight(sum_, slot.step, slot.passes)), *calls]

        try:
            self.group.sum_async(sent, slot._replace(layer=EVERY_LAYER), note)
        except RuntimeError as error:
            raise self._missed(slot.step, error) from error
        return completed

    def complete(self, slot: Slot, enter: Enter) -> Tensor | None:
        """Wait for the sum in flight and return it, if any. It is no longer in flight then; nothing is sent."""
        if self._reached is not slot:
            completed = self._wait()
            uninterrupted(
                *enter(completed, None),
                *(put(self, "_completed", completed), put(self, "_pending", None), put(self, "_reached", slot)),
            )
        return self._completed

    def take(self, slot: Slot, enter: Enter, result: list[GlobalStatistics]) -> list[GlobalStatistics]:
        """End a step whose sums need no collective: record the vector of this step. Return the first ``result``."""
        if self._ended is not slot:
            own = self.outbox.clone()
            calls = [*self._start_next(own), *enter(own, None)]
            uninterrupted(*calls, put(self, "_result", result), put(self, "_ended", slot))
        return self._result

    def _start_next(self, own: Tensor) -> list[Call]:
        """Start the next step; ``own`` copies the last vector, since replayed CUDA graphs write to the original."""
        return [put(self, "last", own), self.outbox.zero_]

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

    def global_statistics(self, means: Tensor, weights: Tensor, usable: Tensor) -> list[GlobalStatistics]:
        """Return what the running statistics are to be updated with: the forward slots of these vectors."""
        rows = zip(self.index, means.split(self._sizes), weights.unbind(), usable.double().unbind(), strict=True)
        return [
            GlobalStatistics(layer, values[: -self._extra] if self._extra else values, weight, completed, name)
            for (layer, direction, name), values, weight, completed in rows
            if direction == "forward"
        ]

    def statistics(self, means: Tensor) -> dict[str, Tensor]:
        """Return by layer and share the forward slot in ``means`` of all slots."""
        forward = ((label(layer, name), span) for (layer, where, name), span in self.span.items() if where == "forward")
        spans = dict(forward)
        return {layer: means[span.start : span.stop - self._extra] for layer, span in spans.items()}

    def _check_phase(self, completed: Tensor, passes: int) -> None:
        if completed.device.type == "cpu" and completed[-1].item() != passes * self.group.size:
            self.warn_once(
                "phase",
                f"distnorm: ranks {list(self.group.ranks)} end their steps at different times, so moving statistics "
                "mix steps. A backward pass on some rank reached no converted layer, or ranks run different numbers of "
                "backward passes. Let the optimizer end the steps: distnorm.attach(model, optimizer=optimizer).",
            )

    def warn_once(self, about: str, message: str) -> None:
        """Log ``message`` the first time that it is about the topic ``about``."""
        if about not in self._warned:
            self._warned.add(about)
            logger.warning(message)

    def warn_of_drops(self) -> None:
        """Log once which layers had values dropped. Waits for the device."""
        if self.dropped.is_meta:
            return
        dropped = self.dropped.tolist()
        lost = [f"{label(layer, name)} ({where})" for (layer, where, name), n in self.index.items() if dropped[n] > 0]
        if lost:
            self.warn_once("drops", f"distnorm: NaN or Inf from some rank; those steps were left out for {lost}.")

    def state_dict(self) -> dict[str, Any]:
        """Wait for the vector in flight and store it as in flight, so that saving does not change the trajectory."""
        state: dict[str, Any] = {"outbox": self.outbox.clone(), "dropped": self.dropped.clone()}
        in_flight = self._wait()
        if in_flight is not None:
            state["in_flight"] = in_flight.clone()
            state["in_flight"][-1] = 0  # known to this process only
        return state

    def load_state_dict(self, state: dict[str, Any], *, own: bool) -> None:
        """Resume; the outbox belongs to this rank only if ``own``."""
        self.dropped.copy_(state["dropped"])
        self.outbox.zero_()
        if own:
            self.outbox.copy_(state["outbox"])
        in_flight = state.get("in_flight")
        self._pending = None
        if in_flight is not None:
            vector = in_flight.to(self.outbox.device, copy=True)
            self._pending = _InFlight(Future.completed(vector), -1, None)
