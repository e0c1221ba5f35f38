"""Differentiable communication: two Functions that are conjugate at every order, and that of maxima.

``ReduceForward`` sends a vector through the policy, and its derivative is ``ReduceBackward``. ``ReduceBackward`` is the
identity, and its derivative sends the cotangent through the policy, which is ``ReduceForward`` again. docs/autograd.md
derives what follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distnorm.autograd.share import divisor
from distnorm.compat.dispatch_state import are_plain, is_batch
from distnorm.types import Op

if TYPE_CHECKING:
    from distnorm.layers.line import Line


class ReduceForward(torch.autograd.Function):
    """``y = policy(payload)``; its derivative is ``ReduceBackward``.

    ``payload`` is statistics with their count if ``count`` is None, else cotangents of a forward that got
    ``count``; ``name`` is that of the share. The policy is reached through the forward's ``line``, or through operators
    if there is a ``number``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        payload: Tensor,
        count: Tensor | None,
        name: str,
        number: Tensor | None,
        line: Line | None,
        learning: bool,
    ) -> Tensor:
        """Reduce. Uses the policy once."""
        ctx.line, ctx.name = line, name
        if count is not None:
            ctx.save_for_backward(count, number)
            return _share_cotangents(payload, count, name, number, line, learning)
        shared = _share_statistics(payload, name, "sum", number, line, learning, in_graph=ctx.needs_input_grad[0])
        ctx.save_for_backward(shared[-1].clone(), number)
        return shared.view_as(payload)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Return the gradient unchanged: ``ReduceBackward`` has shared this cotangent already."""
        count, number = ctx.saved_tensors
        return ReduceBackward.apply(grad, count, ctx.name, number, ctx.line), None, None, None, None, None


class MaxForward(torch.autograd.Function):
    """``y = [maxima over ranks, how many values of all ranks attain them, count]`` of such a payload.

    The derivative is that of the maxima. It passes ``ReduceBackward``, as that of ``ReduceForward`` does, and what
    arrives is divided among all values that attain the maximum.
    """

    @staticmethod
    def forward(
        ctx: Any, maxima: Tensor, rest: Tensor, name: str, number: Tensor | None, line: Line | None, learning: bool
    ) -> Tensor:
        """Share ``[maxima, rest]``. Uses the policy once."""
        payload, many = torch.cat((maxima, rest)), maxima.numel()
        shared = _share_statistics(payload, name, "max", number, line, learning, in_graph=ctx.needs_input_grad[0])
        own = torch.where(maxima == shared[:many], rest[:-1] / divisor(shared[many:-1]), 0)
        ctx.line, ctx.name, ctx.many = line, name, many
        ctx.save_for_backward(own, shared[-1].clone(), number)
        return shared.view_as(payload)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        """Return this rank's part of the gradient of the maxima."""
        own, count, number = ctx.saved_tensors
        grad = ReduceBackward.apply(grad[: ctx.many], count, ctx.name, number, ctx.line)
        return grad * own, None, None, None, None, None


class ReduceBackward(torch.autograd.Function):
    """``y = theta``; its derivative is ``ReduceForward`` of the cotangent."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, count: Tensor, name: str, number: Tensor | None, line: Line | None) -> Tensor:
        """Return ``theta``. Issues no collective."""
        ctx.line, ctx.name = line, name
        ctx.save_for_backward(count, number)
        return theta.view_as(theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Share the cotangent."""
        if not torch.compiler.is_compiling() and is_batch(grad):
            raise ctx.line.refusal()
        count, number = ctx.saved_tensors
        learning = not torch.is_grad_enabled()
        shared = ReduceForward.apply(grad.flatten(), count, ctx.name, number, ctx.line, learning)
        return shared.view_as(grad), None, None, None, None


def _share_statistics(
    payload: Tensor, name: str, op: Op, number: Tensor | None, line: Line | None, learning: bool, *, in_graph: bool
) -> Tensor:
    if number is not None:
        shared: Tensor = torch.ops.distnorm.statistics(payload, number, learning, name, op)
        return shared
    assert line is not None, "one or the other leads to the policy"
    return line.gather(payload, in_graph=in_graph, name=name, op=op)


def _share_cotangents(
    payload: Tensor, count: Tensor, name: str, number: Tensor | None, line: Line | None, learning: bool
) -> Tensor:
    if line is not None and number is None and are_plain(payload):
        return line.start_cotangents(payload, count, learning=learning, name=name).wait()
    if number is None:
        assert line is not None, "one or the other leads to the policy"
        number = line.site.scalar()
    shared: Tensor = torch.ops.distnorm.cotangents(payload, count, number, name)
    return shared
