"""Communication meets autograd: two Functions that are conjugate at every order.

``ReduceForward`` sends a vector through the policy, and its derivative is ``ReduceBackward``; ``ReduceBackward`` is the
identity, and its derivative sends the cotangent through the policy, which is ``ReduceForward`` again. Between the two
stand only values that are equal on all sharing ranks, and no trainable parameter::

    local sums -> ReduceForward -> shared means -> link -> ReduceBackward -> theta -> local outputs

docs/autograd.md derives why this gives the gradient of the joined batch at first and second order, with one collective
per direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distnorm.autograd.engine import backward_may_follow, repeating
from distnorm.autograd.operators import Channel, scalar
from distnorm.compat.dispatch_state import are_plain, is_batch, transforming
from distnorm.types import Future, Link


class ReduceForward(torch.autograd.Function):
    """``y = policy(wire)``; its derivative is ``ReduceBackward``.

    The wire is statistics with their count if ``count`` is None, else cotangents of a forward that was given ``count``.
    The policy is reached through the forward's ``line``, or through operators if there is a ``number``.
    """

    @staticmethod
    def forward(
        ctx: Any, wire: Tensor, count: Tensor | None, number: Tensor | None, line: LayerShare | None, learning: bool
    ) -> Tensor:
        """Reduce. One use of the policy."""
        ctx.line = line
        if count is not None:
            ctx.save_for_backward(count, number)
            return _share_cotangents(wire, count, number, line, learning)
        if number is not None:
            shared: Tensor = torch.ops.distnorm.statistics(wire, number, learning)
        else:
            assert line is not None, "one or the other leads to the policy"
            shared = line.gather(wire, held=ctx.needs_input_grad[0]).view_as(wire)
        ctx.save_for_backward(shared[-1].clone(), number)
        return shared

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The cotangent has been shared already, where it passed ``ReduceBackward``."""
        count, number = ctx.saved_tensors
        return ReduceBackward.apply(grad, count, number, ctx.line), None, None, None, None


class ReduceBackward(torch.autograd.Function):
    """``y = theta``; its derivative is ``ReduceForward`` of the cotangent."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, count: Tensor, number: Tensor | None, line: LayerShare | None) -> Tensor:
        """The identity. No collective."""
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
    wire: Tensor, count: Tensor, number: Tensor | None, line: LayerShare | None, learning: bool
) -> Tensor:
    if number is not None:
        shared: Tensor = torch.ops.distnorm.cotangents(wire, count, number)
        return shared
    assert line is not None, "one or the other leads to the policy"
    return line.cotangents(wire, count, learning=learning)


class LayerShare:
    """``share`` for one forward pass of one layer; remembers what it shared, for the running statistics."""

    def __init__(self, channel: Channel, step: int, *, opaque: bool) -> None:
        """Share through ``channel`` in training step ``step``; ``opaque``: by operators, in the current step."""
        self._channel = channel
        self.step = step
        self.opaque = opaque
        self.learning = backward_may_follow()
        self._builds_graph = torch.is_grad_enabled()  # inside of a Function's forward it never is
        self.shared: Tensor | None = None
        self.absorbed = False

    def __call__(self, count: int, sums_KC: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        """``theta = link(shared sums / shared count)``, and the shared count, a float64 scalar without gradient.

        One use of the policy forward, and one backward if ``sums_KC`` needs a gradient.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and transforming():
            raise self.refusal()
        local = torch.cat((sums_KC.flatten(), sums_KC.new_full((1,), count)))
        way = (self._number() if self.opaque else None, None if compiling else self)
        shared = ReduceForward.apply(local, None, *way, self.learning)
        total = shared[-1].detach()
        means_KC = shared[:-1].view_as(sums_KC) / _divisor(total)
        self.shared = shared.detach()
        theta_KC = ReduceBackward.apply(link(means_KC), total, *way)
        return theta_KC, total

    def _number(self) -> Tensor:
        return self._channel.number if torch.compiler.is_compiling() else scalar(self._channel.key)

    def refusal(self) -> RuntimeError:
        """What says that transforms do not reach other ranks."""
        return RuntimeError(
            f"{self._channel.name}: statistics that ranks or steps share cannot pass a transform (torch.func.grad, "
            "vmap, jvp, forward-mode derivatives, is_grads_batched=True, vectorize=True) or torch.jit.trace. Use "
            "autograd's backward pass, one gradient at a time, or a recipe that shares nothing, such as local_bn; or "
            "call eval() first."
        )

    def gather(self, wire: Tensor, *, held: bool, enough: bool = False) -> Tensor:
        """The shared counterpart of local sums and count. One use of the policy; nothing is differentiated."""
        # The graph keeps this share and its record alive, for as long as a checkpoint may recompute this forward.
        self._record = self._channel.statistics(
            wire, self.step, learning=self.learning, held=held and self._builds_graph, enough=enough
        )
        self.shared = self._record.shared
        return self.shared

    def cotangents(self, wire: Tensor, count: Tensor, *, learning: bool) -> Tensor:
        """The cotangents' shared counterpart. One use of the policy; nothing is differentiated."""
        if are_plain(wire):
            return self._channel.cotangents(wire, count, self.step, learning=learning)
        found: Tensor = torch.ops.distnorm.cotangents(wire, count, scalar(self._channel.key))
        return found

    def scatter(self, cotangents: Tensor) -> Future:
        """What gives the cotangents' shared counterpart. One use of the policy; nothing is differentiated."""
        assert self.shared is not None, "nothing was shared yet"
        return self._channel.start_cotangents(cotangents, self.shared[-1], self.step, learning=True)

    def again(self, *, opaque: bool = False) -> LayerShare:
        """For a repetition inside a backward pass, where the channel answers from its records."""
        return LayerShare(self._channel, self.step, opaque=opaque)

    def landed(self) -> Tensor | bool:
        """Whether what was shared is fit for the running statistics; in a compiled graph a scalar, 1 or 0."""
        if torch.compiler.is_compiling():
            assert self.shared is not None, "nothing was shared yet"
            landed: Tensor = torch.ops.distnorm.lands(self.shared[-1], self._channel.number, self.learning)
            return landed
        return self.lands()

    def lands(self) -> bool:
        """Whether what was shared is fit for the running statistics, and not there already. Not in compiled graphs."""
        return not self._record.repeated and self._channel.lands(self.step, learning=self.learning)


class KeepLocal:
    """A ``share`` that shares nothing, and remembers what it was given."""

    opaque = False

    def __init__(self) -> None:
        """Nothing yet."""
        self.shared: Tensor | None = None
        self.absorbed = False

    def __call__(self, count: int, sums_KC: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        """``link(sums / count)``, and the count."""
        total = sums_KC.new_full((), count)
        self.shared = torch.cat((sums_KC.detach().flatten(), total[None]))
        return link(sums_KC / total.clamp_min(1)), total

    def gather(self, wire: Tensor, *, held: bool = False, enough: bool = False) -> Tensor:
        """The local sums and count."""
        self.shared = wire
        return wire

    def scatter(self, cotangents: Tensor) -> Future:
        """The cotangents."""
        return Future.completed(cotangents)

    def again(self, *, opaque: bool = False) -> KeepLocal:
        """Another one."""
        return KeepLocal()

    def landed(self) -> bool:
        """Local statistics are there."""
        return self.lands()

    def lands(self) -> bool:
        """Local statistics are there, unless a forward is repeated, whose first run has absorbed them."""
        return not repeating()


def _divisor(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, 1)
