"""A conversion bound to ranks: where steps start and end, what is in flight, and what DDP broadcasts."""

from __future__ import annotations

import logging
from threading import get_ident
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from distnorm.autograd.engine import NO_BACKWARD, at_end_of_backward, graph_task
from distnorm.compat.dispatch_state import modes_disabled
from distnorm.compat.uninterrupted import Call, put, uninterrupted
from distnorm.layers import agreement, running_statistics
from distnorm.layers.ddp import Broadcasts
from distnorm.transport.rendezvous import all_gather_text
from distnorm.types import EVERY_LAYER, GlobalStatistics, Slot

logger = logging.getLogger("distnorm")

if TYPE_CHECKING:
    from distnorm.layers.conversion import Conversion


class Binding:
    """A conversion bound to ranks."""

    def __init__(self, conversion: Conversion, world: dist.ProcessGroup | None, agreed: agreement.Agreement) -> None:
        """Bind within ``world``, the job that the groups belong to; None for a single process without a job."""
        self.conversion = conversion
        self._world = None if world is None else ref(world)  # weakly, as in ``TorchGroup``
        self.topology, self.reducer = agreed.topology, agreed.reducer
        self.alone = agreed.reducer.facts.alone
        self.agrees = agreed.agrees
        """Whether running statistics are equal on all data-parallel ranks without further communication."""
        self.thread = get_ident()
        """The thread that trains: others, as those that save in the background, must not wait for its collectives."""
        self.step = self._passes = 0
        self._ending: Slot | None = None
        """Set while a step ends, which an exception from outside, such as Ctrl-C, may interrupt."""
        self._boundary_queued = self._warned = False
        self._first_pass: int | None = None
        self._used: dict[str, set[str]] = {}
        """The layers of this step, and the names of what they have shared."""
        self.loss_scale: Tensor | float = 0.0  # of the last backward pass
        self._scaled_pass = self._judged_pass = NO_BACKWARD
        self._in_flight: dict[str, list[GlobalStatistics]] | None = None
        self._broadcasts = Broadcasts(conversion.layers, () if conversion.is_bounded else agreed.topology.ranks)

    def belongs_to(self, world: dist.ProcessGroup | None) -> bool:
        """Return whether ``world`` is the job that the groups belong to."""
        return world is None if self._world is None else self._world() is world is not None

    def gather_text(self, text: str) -> list[str]:
        """Return every rank's text, in order. Collective over the ranks; no tensors are sent.

        Raises:
            RuntimeError: some ranks sent nothing within the timeout; the message names them.
        """
        timeout = self.topology.timeout
        return [text] if timeout is None else all_gather_text(self.topology.ranks, text, timeout)

    def forward_begins(self, layer: str) -> None:
        """Start a training forward of ``layer``. Inside a backward pass nothing changes: it may be a repetition.

        Outside of a backward pass no boundary can be queued: one left by a pass that raised is dropped. Since training
        continues, stock running statistics that were loaded are converted to what the method tracks.

        Raises:
            RuntimeError: as ``Broadcasts.forward_begins``.
        """
        if graph_task() != NO_BACKWARD:
            return
        self._boundary_queued = False
        if self._ending is not None:
            self.finish_step()  # it was interrupted
        if layer in self._used:
            self._end_skipped_step()
        self._broadcasts.forward_begins(layer, shares=not self.alone)
        if self.conversion.resume_pending:
            with modes_disabled():  # hidden from modes: not part of the forward
                self.conversion.resume_training()

    def loss_scale_of_pass(self) -> Tensor | float:
        """Return the loss scale. Read once per backward pass, since the host waits for a GradScaler on a GPU."""
        ask = self.conversion.loss_scale
        if ask is None:
            return 1.0
        if graph_task() == NO_BACKWARD or graph_task() != self._scaled_pass:
            scale = ask()
            self.loss_scale = scale.clone() if isinstance(scale, Tensor) else scale  # scalers change theirs in place
            self._scaled_pass = graph_task()
        return self.loss_scale

    # docs/decisions.md#a-step-that-a-loss-scaler-skipped
    def _end_skipped_step(self) -> None:
        """End the step if a lower loss scale shows that the optimizer skipped it. Its NaN would enter the next step.

        Checked once after every backward pass, as in ``loss_scale_of_pass``.
        """
        scale = self.conversion.loss_scale
        if scale is not None and not self.conversion.ends_with_backward and self._judged_pass != self._scaled_pass:
            with modes_disabled():
                if scale() < self.loss_scale:
                    self.end_step()
        self._judged_pass = self._scaled_pass

    # docs/decisions.md#calls-of-one-layer-share-one-window
    def note_use(self, layer: str, name: str) -> None:
        """Note that ``layer`` has shared ``name``. Warn if it has in this step: it may be a missed end of a step."""
        if name in self._used.setdefault(layer, set()) and not self._warned and self.conversion.ends_with_backward:
            self._warned = True
            if self.conversion.facts.keeps_cotangents:
                logger.warning(
                    "distnorm: %s ran twice in one step; its calls share one window. If these were separate steps, or "
                    "one optimizer step over several backward passes, say so: distnorm.attach(model, optimizer=...).",
                    layer,
                )
        self._used[layer].add(name)

    # docs/decisions.md#when-a-step-ends
    def expect_boundary(self) -> None:
        """End the step when the outermost backward pass of this thread ends.

        Called inside a backward pass. The nested pass of a reentrant checkpoint comes after its recomputation, which
        has queued the boundary at the outer pass already.
        """
        if self.conversion.ends_with_backward and not self._boundary_queued:
            self._boundary_queued = True
            self._first_pass = graph_task() if self._first_pass is None else self._first_pass
            self._passes = graph_task() - self._first_pass
            at_end_of_backward(self.end_step)

    def end_step(self) -> None:
        """Let the policy send and receive, and update the running statistics with the completed sums.

        If this is interrupted, the next ``end_step`` or the next forward resumes it.

        Raises:
            RuntimeError: another rank did not take part within the timeout.
        """
        self._boundary_queued = False
        if self._ending is None:
            passes = self._passes if self.conversion.ends_with_backward else 0
            observers = tuple(self.conversion.observers)
            self._ending = Slot(EVERY_LAYER, "forward", self.step, observers=observers, passes=passes)
        with torch.inference_mode(False):
            self._finish(self._ending)

    def finish_step(self) -> None:
        """Resume the end of a step that was interrupted, if any. Each part of it is done once."""
        if self._ending is not None:
            with modes_disabled():  # hidden from modes: not part of a forward or of other work
                self._finish(self._ending)

    def _finish(self, slot: Slot) -> None:
        statistics = self.reducer.end_step(slot)
        updates: list[Call] = []
        if statistics:
            with torch.no_grad():
                layers = dict(self.conversion.layers())
                updates = running_statistics.updating(layers, statistics, self.conversion.recipe.method)
        uninterrupted(
            *(*updates, self._used.clear),
            *(put(self, "_in_flight", None), put(self, "step", slot.step + 1), put(self, "_ending", None)),
        )

    # docs/decisions.md#evaluation-and-checkpoints-include-sums-in-flight
    def in_flight(self) -> dict[str, list[GlobalStatistics]]:
        """Return by layer what the last step sent and is not in the running statistics yet. Waits for it once.

        No collective: every rank that ends the same steps has sent its part.
        """
        self.finish_step()
        if self._in_flight is None:
            self._in_flight = running_statistics.by_layer(self.reducer.in_flight())
        return self._in_flight

    def forget_in_flight(self) -> None:
        """Ignore what the last step sent: running statistics are estimated from scratch, without gradients."""
        self._in_flight = {}

    def load(self, state: dict[str, Any], *, own: bool) -> None:
        """Resume from a ``Conversion.state_dict``, of this rank if ``own``, else of another one."""
        self.reducer.load_state_dict(state["reducer"], own=own)
        self.step = state["step"]
        self._in_flight = self._ending = None
