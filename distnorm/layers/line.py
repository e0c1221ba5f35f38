"""The connection of one forward to the policy, as differentiable communication.

On the plain path two Functions are conjugate at every order. ``ReduceForward`` sends a vector through the policy, and
its derivative is ``ReduceBackward``. ``ReduceBackward`` is the identity, and its derivative sends the cotangent through
the policy, which is ``ReduceForward`` again. Between the two are only values that are equal on all sharing ranks, and
no trainable parameter::

    local sums -> ReduceForward -> shared means -> link -> ReduceBackward -> theta -> local outputs

docs/autograd.md derives why this gives the gradient of the joined batch at first and second order, with one collective
per direction. Kernels, which know their derivative, call ``gather`` and ``scatter``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distnorm.autograd.engine import NO_BACKWARD, backward_may_follow, graph_task, repeating
from distnorm.autograd.recompute import Record
from distnorm.compat.dispatch_state import are_plain, in_transform, is_batch
from distnorm.layers.binding import Binding
from distnorm.layers.site import Site
from distnorm.types import Direction, Future, Link, Slot

NOW = -1
"""The step of a compiled graph, which is unknown while tracing."""


class ReduceForward(torch.autograd.Function):
    """``y = policy(payload)``; its derivative is ``ReduceBackward``.

    ``payload`` is statistics with their count if ``count`` is None, else cotangents of a forward that got
    ``count``. The policy is reached through the forward's ``line``, or through operators if there is a ``number``.
    """

    @staticmethod
    def forward(
        ctx: Any, payload: Tensor, count: Tensor | None, number: Tensor | None, line: Line | None, learning: bool
    ) -> Tensor:
        """Reduce. Uses the policy once."""
        ctx.line = line
        if count is not None:
            ctx.save_for_backward(count, number)
            return _share_cotangents(payload, count, number, line, learning)
        if number is not None:
            shared: Tensor = torch.ops.distnorm.statistics(payload, number, learning)
        else:
            assert line is not None, "one or the other leads to the policy"
            shared = line.gather(payload, in_graph=ctx.needs_input_grad[0]).view_as(payload)
        ctx.save_for_backward(shared[-1].clone(), number)
        return shared

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Return the gradient unchanged: ``ReduceBackward`` has shared this cotangent already."""
        count, number = ctx.saved_tensors
        return ReduceBackward.apply(grad, count, number, ctx.line), None, None, None, None


class ReduceBackward(torch.autograd.Function):
    """``y = theta``; its derivative is ``ReduceForward`` of the cotangent."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, count: Tensor, number: Tensor | None, line: Line | None) -> Tensor:
        """Return ``theta``. Issues no collective."""
        ctx.line = line
        ctx.save_for_backward(count, number)
        return theta.view_as(theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Share the cotangent."""
        if not torch.compiler.is_compiling() and is_batch(grad):
            raise ctx.line.refusal()
        count, number = ctx.saved_tensors
        shared = ReduceForward.apply(grad.flatten(), count, number, ctx.line, not torch.is_grad_enabled())
        return shared.view_as(grad), None, None, None


def _share_cotangents(
    payload: Tensor, count: Tensor, number: Tensor | None, line: Line | None, learning: bool
) -> Tensor:
    if line is not None and number is None and are_plain(payload):
        return line.start_cotangents(payload, count, learning=learning).wait()
    if number is None:
        assert line is not None, "one or the other leads to the policy"
        number = line.site.scalar()
    shared: Tensor = torch.ops.distnorm.cotangents(payload, count, number)
    return shared


# docs/decisions.md#one-line-from-a-layer-to-its-policy
class Line:
    """The connection of one forward to the policy; see ``autograd.share.Exchange``. ``open_line`` makes a bound one."""

    shared: Tensor | None = None

    def __init__(
        self, site: Site, binding: Binding | None, step: int, *, opaque: bool, learning: bool | None = None
    ) -> None:
        """Connect the layer of ``site`` in training step ``step``.

        ``binding``: None in a compiled graph and for fake tensors, which reach ranks through operators only, if at all.
        ``opaque``: the plain path shares through operators. ``learning``: a backward may follow; None asks the engine.
        """
        self.site, self._binding, self._step = site, binding, step
        self.opaque = opaque
        self.learning = backward_may_follow() if learning is None else learning
        self._builds_graph = torch.is_grad_enabled()  # never so inside a Function's forward

    def __call__(self, count: int, sums_KC: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        """Return ``theta = link(shared sums / shared count)``, and the shared count, a float64 scalar without gradient.

        Uses the policy once in the forward pass, and once in the backward pass if ``sums_KC`` needs a gradient.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and in_transform():
            raise self.refusal()
        local = torch.cat((sums_KC.flatten(), sums_KC.new_full((1,), count)))
        way = (self.number() if self.opaque else None, None if compiling else self)
        shared = ReduceForward.apply(local, None, *way, self.learning)
        total = shared[-1].detach()
        means_KC = shared[:-1].view_as(sums_KC) / _divisor(total)
        self.shared = shared.detach()
        theta_KC = ReduceBackward.apply(link(means_KC), total, *way)
        return theta_KC, total

    def number(self) -> Tensor:
        """Return the number by which operators find the layer."""
        return self.site.number if torch.compiler.is_compiling() else self.site.scalar()

    def refusal(self) -> RuntimeError:
        """Return the error for transforms, which do not reach other ranks."""
        return RuntimeError(
            f"{self.site.name}: statistics that ranks or steps share cannot pass a transform (torch.func.grad, "
            "vmap, jvp, forward-mode derivatives, is_grads_batched=True, vectorize=True) or torch.jit.trace. Use "
            "autograd's backward pass, one gradient at a time, or a recipe that shares nothing, such as local_bn; or "
            "call eval() first."
        )

    def gather(self, payload: Tensor, *, in_graph: bool, has_two_values: bool = False) -> Tensor:
        """Return the shared sums and count. Uses the policy once, or not at all in a recomputation.

        Raises:
            ValueError: 1 value per channel over all sharing ranks.
        """
        site, binding = self.site, self._binding
        assert binding is not None, "operators and kernels run on a line that is bound"
        record = site.records.recall(payload, site.conversion.recipe.method.kinds) if repeating() else None
        if record is not None:
            record.repeated = True
            # A reentrant checkpoint: its cotangents come in a nested pass, whose end is not the end of the step.
            if not record.in_graph:
                binding.expect_boundary()
        else:
            record = self._share(
                binding, payload, in_graph=in_graph and self._builds_graph, has_two_values=has_two_values
            )
        # The graph keeps this line and its record alive, as long as a checkpoint may recompute this forward.
        self._record = record
        self.shared = record.shared
        return record.shared

    def _share(self, binding: Binding, payload: Tensor, *, in_graph: bool, has_two_values: bool) -> Record:
        site = self.site
        slot = self._slot = self._slot_of(binding, "forward", learning=self.learning)
        if self.learning:
            binding.note_use(site.name)
        else:
            binding.forget_in_flight()
        try:
            shared = binding.reducer.reduce(payload, slot)
        except RuntimeError as error:
            raise self._failed(binding, "forward", error) from error
        if not has_two_values and binding.reducer.completeness(slot).is_counted:
            # A policy that shares nothing in this step returns ``payload`` itself.
            site.check_count(shared[-1], 1 if shared is payload else binding.reducer.size)
        record = Record(payload, shared, slot.step, in_graph=in_graph)
        site.records.note(record)
        return record

    def updates_running(self) -> bool:
        """Return whether the gathered sums are to update the running statistics: global, and not used before."""
        assert self._binding is not None, "it has gathered"
        return not self._record.repeated and self._binding.reducer.completeness(self._slot).is_global

    def step_is_global(self) -> bool:
        """Return whether statistics of this step are global, so that they may update the running statistics."""
        assert self._binding is not None, "operators run on a line that is bound"
        slot = self._slot_of(self._binding, "forward", learning=self.learning)
        return self._binding.reducer.completeness(slot).is_global

    def scatter(self, cotangents: Tensor) -> Future:
        """Start sharing the cotangents, and return a future of the result. Uses the policy once."""
        assert self.shared is not None, "it has gathered"
        return self.start_cotangents(cotangents, self.shared[-1], learning=True)

    def start_cotangents(self, payload: Tensor, count: Tensor, *, learning: bool) -> Future:
        """Start sharing the cotangents of a forward that got ``count``, and return a future of the result.

        ``learning``: false while a graph is built (``create_graph=True``), since that pass ends no step.

        Raises:
            RuntimeError: second derivatives of a policy whose cotangents outlive their step.
        """
        conversion = self.site.conversion
        binding, keeps = conversion.bound(), conversion.facts.keeps_cotangents
        if keeps and not learning:
            raise RuntimeError(
                f"{self.site.name}: {conversion.recipe.policy} averages cotangents over steps, so there is no second "
                "derivative (create_graph=True). Use an exact recipe such as sync_bn for this layer."
            )
        if learning and graph_task() != NO_BACKWARD:
            binding.expect_boundary()
        scale = binding.loss_scale_of_pass() if keeps else 1.0
        slot = self._slot_of(binding, "backward", learning=learning, count=count, scale=scale)
        try:
            answer = binding.reducer.start(payload, slot)
        except RuntimeError as error:
            raise self._failed(binding, "backward", error) from error

        def wait() -> Tensor:
            try:
                return answer.wait()
            except RuntimeError as error:
                raise self._failed(binding, "backward", error) from error

        return Future(wait)

    def for_recomputation(self, *, opaque: bool = False) -> Line:
        """Return a line for a repetition inside a backward pass, which gets its sums from the layer's records."""
        return Line(self.site, self._binding, self._step, opaque=opaque)

    def _slot_of(
        self,
        binding: Binding,
        direction: Direction,
        *,
        learning: bool,
        count: Tensor | None = None,
        scale: Tensor | float = 1.0,
    ) -> Slot:
        site = self.site
        observers = tuple(site.conversion.observers)
        return Slot(site.name, direction, self._step, learning, count, scale, observers, 0, binding.topology.model)

    def _failed(self, binding: Binding, direction: Direction, error: RuntimeError) -> RuntimeError:
        return RuntimeError(
            f"{self.site.name}: sharing {direction} statistics ({self.site.conversion.recipe.policy}) among ranks "
            f"{list(binding.topology.ranks)} failed. Another rank has probably stopped, ran out of data, or runs "
            f"other layers; its own message says more. Cause: {error}"
        )


def open_line(site: Site, *, opaque: bool, learning: bool | None = None) -> Line:
    """Start a forward in the current step, and return its line. Binds the layer first if necessary."""
    binding = site.conversion.bound()
    binding.forward_begins(site.name)
    return Line(site, binding, binding.step, opaque=opaque, learning=learning)


def _divisor(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, 1)
