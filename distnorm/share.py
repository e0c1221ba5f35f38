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
from collections.abc import Callable
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from distnorm.boundary import backward_may_follow
from distnorm.recompute import Record
from distnorm.types import Link


class Channel(Protocol):
    """One layer's line to its policy."""

    def statistics(self, wire: Tensor, step: int, *, learning: bool, held: bool, enough: bool = False) -> Record:
        """Share local sums and their count, as of training step ``step``.

        ``learning``: a backward may follow. ``held``: a graph keeps the record alive. ``enough``: two local values are
        known to be there.
        """
        ...

    def cotangents(self, wire: Tensor, count: Tensor, step: int, *, learning: bool) -> Tensor:
        """Share local cotangents of a forward in training step ``step`` that was given ``count``.

        ``learning``: not while a graph is being built (``create_graph=True``), when the pass ends no step.
        """
        ...

    def start_cotangents(self, wire: Tensor, count: Tensor, step: int, *, learning: bool) -> Callable[[], Tensor]:
        """``cotangents``, whose result is asked for later."""
        ...

    def lands(self, step: int, *, learning: bool) -> bool:
        """Whether the statistics of ``step`` are fit for the running statistics."""
        ...

    def ahead(self, mean_C: Tensor, var_C: Tensor) -> tuple[Tensor, Tensor]:
        """Running mean and variance with what the last step sent, which the buffers have not absorbed yet."""
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


# The policy as opaque operators: the form in which compiled graphs hold its collectives.


@torch.library.custom_op("distnorm::statistics", mutates_args=())
def statistics_op(wire: Tensor, key: int, learning: bool) -> Tensor:
    """``Channel.statistics``, in the current step."""
    return _channels[key].statistics(wire, NOW, learning=learning, held=False).shared.clone()


@torch.library.custom_op("distnorm::cotangents", mutates_args=())
def cotangents_op(wire: Tensor, count: Tensor, key: int) -> Tensor:
    """``Channel.cotangents``, in the current step."""
    return _channels[key].cotangents(wire, count, NOW, learning=True).clone()


@torch.library.custom_op("distnorm::lands", mutates_args=())
def lands_op(count: Tensor, key: int, learning: bool) -> Tensor:
    """1 where the statistics that came with ``count`` are fit for the running statistics, else 0, in its dtype."""
    return torch.full_like(count, _channels[key].lands(NOW, learning=learning))


@torch.library.custom_op("distnorm::running", mutates_args=())
def running_op(mean_C: Tensor, var_C: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """``Channel.ahead`` of the buffers ``mean_C`` and ``var_C``, as copies."""
    mean_C, var_C = _channels[key].ahead(mean_C, var_C)
    return mean_C.clone(), var_C.clone()


@running_op.register_fake
def _(mean_C: Tensor, var_C: Tensor, key: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean_C), torch.empty_like(var_C)


@statistics_op.register_fake
def _(wire: Tensor, key: int, learning: bool) -> Tensor:
    return torch.empty_like(wire)


@cotangents_op.register_fake
def _(wire: Tensor, count: Tensor, key: int) -> Tensor:
    return torch.empty_like(wire)


@lands_op.register_fake
def _(count: Tensor, key: int, learning: bool) -> Tensor:
    return torch.empty_like(count)


class ReduceForward(torch.autograd.Function):
    """``y = policy(wire)``; its derivative is ``ReduceBackward``.

    The wire is statistics with their count if ``count`` is None, else cotangents of a forward that was given ``count``.
    """

    @staticmethod
    def forward(ctx: Any, wire: Tensor, count: Tensor | None, key: int, step: int, learning: bool) -> Tensor:
        """Reduce. One use of the policy."""
        ctx.address = key, step
        shared = _share(ctx, wire, learning) if count is None else _share_cotangents(wire, count, key, step, learning)
        ctx.save_for_backward(shared[-1].clone() if count is None else count)
        return shared

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The cotangent has been shared already, where it passed ``ReduceBackward``."""
        (count,) = ctx.saved_tensors
        return ReduceBackward.apply(grad, count, *ctx.address), None, None, None, None


class ReduceBackward(torch.autograd.Function):
    """``y = theta``; its derivative is ``ReduceForward`` of the cotangent."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, count: Tensor, key: int, step: int) -> Tensor:
        """The identity. No collective."""
        ctx.address = key, step
        ctx.save_for_backward(count)
        if not torch.compiler.is_compiling():
            ctx.channel = _channels[key]  # a graph may outlive its layer
        return theta.view_as(theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Share the cotangent."""
        (count,) = ctx.saved_tensors
        shared = ReduceForward.apply(grad.flatten(), count, *ctx.address, not torch.is_grad_enabled())
        return shared.view_as(grad), None, None, None


def _share(ctx: Any, wire: Tensor, learning: bool) -> Tensor:
    key, step = ctx.address
    if torch.compiler.is_compiling():
        shared: Tensor = torch.ops.distnorm.statistics(wire, key, learning)
        return shared
    ctx.channel = _channels[key]  # a graph may outlive its layer
    # The node keeps the record alive, for as long as a checkpoint may recompute this forward.
    record = ctx.record = ctx.channel.statistics(wire, step, learning=learning, held=ctx.needs_input_grad[0])
    answer: Tensor = record.shared.view_as(wire)
    return answer


def _share_cotangents(wire: Tensor, count: Tensor, key: int, step: int, learning: bool) -> Tensor:
    if torch.compiler.is_compiling():
        shared: Tensor = torch.ops.distnorm.cotangents(wire, count, key)
        return shared
    return _channels[key].cotangents(wire, count, step, learning=learning)


class LayerShare:
    """``share`` for one forward pass of one layer; remembers what it shared, for the running statistics."""

    def __init__(self, key: int, step: int) -> None:
        """Share through the channel with number ``key``, in training step ``step``."""
        self.key = key
        self.step = step
        self.learning = backward_may_follow()
        self._builds_graph = torch.is_grad_enabled()  # inside of a Function's forward it never is
        self.shared: Tensor | None = None
        self.absorbed = False

    def __call__(self, count: int, sums_KC: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        """``theta = link(shared sums / shared count)``, and the shared count, a float64 scalar without gradient.

        One use of the policy forward, and one backward if ``sums_KC`` needs a gradient.
        """
        local = torch.cat((sums_KC.flatten(), sums_KC.new_full((1,), count)))
        shared = ReduceForward.apply(local, None, self.key, self.step, self.learning)
        total = shared[-1].detach()
        means_KC = shared[:-1].view_as(sums_KC) / _divisor(total)
        self.shared = shared.detach()
        theta_KC = ReduceBackward.apply(link(means_KC), total, self.key, self.step)
        return theta_KC, total

    def gather(self, wire: Tensor, *, held: bool, enough: bool = False) -> Tensor:
        """The shared counterpart of local sums and count. One use of the policy; nothing is differentiated."""
        self._channel = _channels[self.key]  # a graph may outlive its layer
        # The graph keeps the record alive, for as long as a checkpoint may recompute this forward.
        self._record = self._channel.statistics(
            wire, self.step, learning=self.learning, held=held and self._builds_graph, enough=enough
        )
        self.shared = self._record.shared
        return self.shared

    def scatter(self, cotangents: Tensor) -> Callable[[], Tensor]:
        """What gives the cotangents' shared counterpart. One use of the policy; nothing is differentiated."""
        assert self.shared is not None, "nothing was shared yet"
        return self._channel.start_cotangents(cotangents, self.shared[-1], self.step, learning=True)

    def again(self) -> LayerShare:
        """For a repetition inside a backward pass, where the channel answers from its records."""
        return LayerShare(self.key, self.step)

    def landed(self) -> Tensor | bool:
        """Whether what was shared is fit for the running statistics; in a compiled graph a scalar, 1 or 0."""
        if torch.compiler.is_compiling():
            assert self.shared is not None, "nothing was shared yet"
            landed: Tensor = torch.ops.distnorm.lands(self.shared[-1], self.key, self.learning)
            return landed
        return self.lands()

    def lands(self) -> bool:
        """Whether what was shared is fit for the running statistics. Not in compiled graphs."""
        return _channels[self.key].lands(self.step, learning=self.learning)


class KeepLocal:
    """A ``share`` that shares nothing, and remembers what it was given."""

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

    def scatter(self, cotangents: Tensor) -> Callable[[], Tensor]:
        """The cotangents."""
        return lambda: cotangents

    def again(self) -> KeepLocal:
        """Another one."""
        return KeepLocal()

    def landed(self) -> bool:
        """Local statistics are there."""
        return True

    def lands(self) -> bool:
        """Local statistics are there."""
        return True


def _divisor(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, 1)
