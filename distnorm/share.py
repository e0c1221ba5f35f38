"""Communication meets autograd: two Functions that are conjugate at every order.

``ReduceForward`` sends a vector through the policy, and its derivative is ``ReduceBackward``; ``ReduceBackward`` is the
identity, and its derivative sends the cotangent through the policy, which is ``ReduceForward`` again. Between the two
stand only values that are equal on all sharing ranks, and no trainable parameter::

    local sums -> ReduceForward -> shared means -> link -> ReduceBackward -> theta -> local outputs

docs/autograd.md derives why this gives the gradient of the joined batch at first and second order, with one collective
per direction.
"""

from __future__ import annotations

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from distnorm.recompute import Record
from distnorm.types import Direction, Link


class Channel(Protocol):
    """One layer's line to its policy."""

    def statistics(self, wire: Tensor, step: int, *, held: bool) -> Record:
        """Share local sums, as of training step ``step``; ``held`` promises that a graph keeps the record alive."""
        ...

    def cotangents(self, wire: Tensor, step: int) -> Tensor:
        """Share local cotangents of a forward in training step ``step``."""
        ...

    def lands(self, step: int) -> bool:
        """Whether the statistics of ``step`` are shared ones."""
        ...


NOW = -1
"""The step in which a compiled graph runs, unknown while it is traced."""

# Compiled graphs carry numbers, not objects: this is where an operator finds the channel that a number stands for.
_channels: WeakValueDictionary[int, Channel] = WeakValueDictionary()
_numbers = itertools.count()


def open_channel(channel: Channel) -> int:
    """Register ``channel`` for as long as it lives and return its number."""
    key = next(_numbers)
    _channels[key] = channel
    return key


@torch.library.custom_op("distnorm::reduce", mutates_args=())
def reduce_op(wire: Tensor, key: int, direction: str) -> Tensor:
    """The policy's reduction as one opaque operator: the form in which compiled graphs hold the collective."""
    channel = _channels[key]
    forward = direction == "forward"
    shared = channel.statistics(wire, NOW, held=False).shared if forward else channel.cotangents(wire, NOW)
    return shared.clone()


@torch.library.custom_op("distnorm::lands", mutates_args=())
def lands_op(count: Tensor, key: int) -> Tensor:
    """1 where the statistics that came with ``count`` are shared ones, else 0, in its dtype."""
    return torch.full_like(count, _channels[key].lands(NOW))


@reduce_op.register_fake
def _(wire: Tensor, key: int, direction: str) -> Tensor:
    return torch.empty_like(wire)


@lands_op.register_fake
def _(count: Tensor, key: int) -> Tensor:
    return torch.empty_like(count)


class ReduceForward(torch.autograd.Function):
    """``y = policy(wire)``; its derivative is ``ReduceBackward``."""

    @staticmethod
    def forward(ctx: Any, wire: Tensor, key: int, direction: Direction, step: int) -> Tensor:
        """Reduce. One use of the policy."""
        ctx.address = key, direction, step
        if torch.compiler.is_compiling():
            reduced: Tensor = torch.ops.distnorm.reduce(wire, key, direction)
            return reduced
        ctx.channel = _channels[key]  # a graph may outlive its layer
        if direction == "backward":
            return _channels[key].cotangents(wire, step)
        # The node keeps the record alive, for as long as a checkpoint may recompute this forward.
        record = ctx.record = _channels[key].statistics(wire, step, held=ctx.needs_input_grad[0])
        return record.shared.view_as(wire)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """The cotangent has been shared already, where it passed ``ReduceBackward``."""
        key, _, step = ctx.address
        return ReduceBackward.apply(grad, key, step), None, None, None


class ReduceBackward(torch.autograd.Function):
    """``y = theta``; its derivative is ``ReduceForward`` of the cotangent."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, key: int, step: int) -> Tensor:
        """The identity. No collective."""
        ctx.address = key, step
        if not torch.compiler.is_compiling():
            ctx.channel = _channels[key]  # a graph may outlive its layer
        return theta.view_as(theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Share the cotangent."""
        key, step = ctx.address
        return ReduceForward.apply(grad, key, "backward", step), None, None


class LayerShare:
    """``share`` for one forward pass of one layer; remembers what it shared, for the running statistics."""

    def __init__(self, key: int, step: int) -> None:
        """Share through the channel with number ``key``, in training step ``step``."""
        self.key = key
        self.step = step
        self.means_KC: Tensor | None = None
        self.count: Tensor | None = None

    def __call__(self, count: int, sums_KC: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        """``theta = link(sum of sums / sum of counts)``, and the shared count, a float64 scalar without gradient.

        One use of the policy forward, and one backward if ``sums_KC`` needs a gradient.
        """
        local = torch.cat((sums_KC.flatten(), sums_KC.new_full((1,), count)))
        shared = ReduceForward.apply(local, self.key, "forward", self.step)
        total = shared[-1].detach()
        means_KC = shared[:-1].view_as(sums_KC) / total.clamp_min(1)
        self.means_KC, self.count = means_KC.detach(), total
        theta_KC = ReduceBackward.apply(link(means_KC), self.key, self.step)
        return theta_KC, total

    def landed(self) -> Tensor:
        """1 if what was shared is fit for the running statistics, else 0: a float64 scalar beside the count."""
        assert self.count is not None, "nothing was shared yet"
        if torch.compiler.is_compiling():
            landed: Tensor = torch.ops.distnorm.lands(self.count, self.key)
            return landed
        return torch.full_like(self.count, _channels[self.key].lands(self.step))


def keep_local(count: int, sums_KC: Tensor, link: Link) -> tuple[Tensor, Tensor]:
    """A ``share`` that shares nothing: for evaluation by batch statistics, which never communicates."""
    total = sums_KC.new_full((), count)
    return link(sums_KC / total.clamp_min(1)), total
