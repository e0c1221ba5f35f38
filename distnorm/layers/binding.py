"""A conversion at work among real ranks: where steps begin and end, what is in flight, and what DDP broadcasts."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
import torch.distributed as dist
from torch import Tensor

from distnorm.autograd.engine import NO_BACKWARD, at_end_of_backward, graph_task
from distnorm.compat.dispatch_state import unseen
from distnorm.layers import agreement, running_statistics
from distnorm.layers.ddp import Broadcasts, refuse_join
from distnorm.transport.rendezvous import tell_and_collect
from distnorm.types import EVERY_LAYER, Landed, Slot

logger = logging.getLogger("distnorm")

if TYPE_CHECKING:
    from distnorm.layers.conversion import Conversion


class Binding:
    """A conversion at work among real ranks."""

    def __init__(self, conversion: Conversion, world: dist.ProcessGroup | None, met: agreement.Meeting) -> None:
        """``world`` is the job that the groups belong to, None in a process that is alone."""
        self.conversion = conversion
        self._world = None if world is None else ref(world)  # weakly, as ``TorchGroup`` holds its group
        self.topology, self.reducer = met.topology, met.reducer
        self.agrees = met.agrees
        """Whether running statistics are equal on all data-parallel ranks without further communication."""
        self.step = self._passes = 0
        self._boundary_queued = self._warned = False
        self._first_pass: int | None = None
        self._used: set[str] = set()
        self.loss_scale: Tensor | float = 0.0  # of the last backward pass
        self._scaled_pass = self._judged_pass = NO_BACKWARD
        self._in_flight: dict[str, Landed] | None = None
        self._broadcasts = Broadcasts(conversion.layers, () if conversion.is_bounded else met.topology.ranks)

    def belongs_to(self, world: dist.ProcessGroup | None) -> bool:
        """Whether ``world`` is the job that the groups belong to."""
        return world is None if self._world is None else self._world() is world is not None

    def tell(self, text: str) -> list[str]:
        """What every rank told, in order. Collective over the ranks; no tensors move.

        Raises:
            RuntimeError: some ranks told nothing within the timeout; the message names them.
        """
        timeout = self.topology.timeout
        return [text] if timeout is None else tell_and_collect(self.topology.ranks, text, timeout)

    def forward_begins(self, layer: str) -> None:
        """Outside of a backward pass nothing can be queued; a queue left by a pass that raised is forgotten.

        Training goes on, so stock running statistics that were loaded must now mean what the method tracks.

        Raises:
            RuntimeError: as ``refuse_join``.
        """
        self._boundary_queued = False
        if layer in self._used:
            self._end_skipped_step()
        if not self.reducer.facts.alone:
            refuse_join(layer)
        self._broadcasts.forward_begins(layer)
        if self.conversion.means_to_fold:
            with unseen():  # by modes: no part of the forward
                self.conversion.training_goes_on()

    def loss_scale_of_pass(self) -> Tensor | float:
        """The factor of the loss; asked for once per backward pass, as a GradScaler makes the host wait for a GPU."""
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
        """A loss scale that fell says that the optimizer skipped a step: end it, or its NaN would enter the next.

        Asked once after every backward pass, as in ``loss_scale_of_pass``.
        """
        scale = self.conversion.loss_scale
        if scale is not None and not self.conversion.ends_with_backward and self._judged_pass != self._scaled_pass:
            with unseen():
                if scale() < self.loss_scale:
                    self.end_step()
        self._judged_pass = self._scaled_pass

    # docs/decisions.md#calls-of-one-layer-share-one-window
    def note_use(self, layer: str) -> None:
        """Watch for a second forward of ``layer`` in one step, which a window cannot tell from a missed step."""
        if layer in self._used and not self._warned and self.conversion.ends_with_backward:
            self._warned = True
            if self.conversion.facts.keeps_cotangents:
                logger.warning(
                    "distnorm: %s ran twice in one step; its calls share one window. If these were separate steps, or "
                    "one optimizer step over several backward passes, say so: distnorm.attach(model, optimizer=...).",
                    layer,
                )
        self._used.add(layer)

    # docs/decisions.md#when-a-step-ends
    def expect_boundary(self) -> None:
        """End the step when the outermost backward pass of this thread ends.

        Called inside a backward pass. The reentrant checkpoint's nested pass comes after its recomputation, which
        has queued the boundary at the outer pass already.
        """
        if self.conversion.ends_with_backward and not self._boundary_queued:
            self._boundary_queued = True
            self._first_pass = graph_task() if self._first_pass is None else self._first_pass
            self._passes = graph_task() - self._first_pass
            at_end_of_backward(self.end_step)

    def end_step(self) -> None:
        """Let the policy send and receive, and the running statistics absorb what landed.

        Raises:
            RuntimeError: another rank did not take part within the timeout.
        """
        self._boundary_queued = False
        passes = self._passes if self.conversion.ends_with_backward else 0
        observers = tuple(self.conversion.observers)
        slot = Slot(EVERY_LAYER, "forward", self.step, observers=observers, passes=passes)
        with torch.inference_mode(False):
            landed = self.reducer.end_step(slot)
        self.step += 1
        self._used.clear()
        self._in_flight = None
        running_statistics.absorb_all(dict(self.conversion.layers()), landed, self.conversion.recipe.method)

    # docs/decisions.md#evaluation-and-checkpoints-include-sums-in-flight
    def in_flight(self) -> dict[str, Landed]:
        """By layer, what the last step sent and the running statistics have not absorbed yet; waits for it once.

        No collective: every rank that ends the same steps has sent its part.
        """
        if self._in_flight is None:
            self._in_flight = {each.layer: each for each in self.reducer.in_flight()}
        return self._in_flight

    def forget_in_flight(self) -> None:
        """Running statistics are estimated anew, without gradients: what the last step sent is no part of them."""
        self._in_flight = {}

    def load(self, state: dict[str, Any], *, own: bool) -> None:
        """Go on from a ``Conversion.state_dict``, this rank's ``own`` or another's."""
        self.reducer.load_state_dict(state["reducer"], own=own)
        self.step = state["step"]
        self._in_flight = None
