"""The policy as opaque operators: what compiled graphs hold in place of it, and what dispatch modes see of it.

Graphs carry numbers, not objects: an operator looks its layer's channel up when it runs.
"""

from __future__ import annotations

import itertools
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from distnorm.autograd.engine import backward_may_follow, repeating
from distnorm.autograd.recompute import Record
from distnorm.compat.dispatch_state import unseen
from distnorm.types import Future


class Channel(Protocol):
    """One layer's line to its policy."""

    name: str
    """The layer's."""

    key: int
    """By which operators find it."""

    number: Tensor
    """The key as an int64 scalar, for compiled graphs: those of equal layers are equal then."""

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

    def start_cotangents(self, wire: Tensor, count: Tensor, step: int, *, learning: bool) -> Future:
        """``cotangents``, whose result is asked for later."""
        ...

    def lands(self, step: int, *, learning: bool) -> bool:
        """Whether the statistics of ``step`` are fit for the running statistics."""
        ...

    def absorb(self, shared: Tensor, *, learning: bool) -> None:
        """Let the layer's running statistics absorb ``shared`` sums and count of the current step, if fit for them."""
        ...

    def ahead(self, mean_C: Tensor, var_C: Tensor) -> tuple[Tensor, Tensor]:
        """Running mean and variance with what the last step sent, which the buffers have not absorbed yet."""
        ...


NOW = -1
"""The step in which a compiled graph runs, unknown while it is traced."""

# Graphs carry numbers, not objects: this is where an operator finds the channel that a number stands for.
_channels: WeakValueDictionary[int, Channel] = WeakValueDictionary()
_numbers = itertools.count()


# docs/decisions.md#compiled-graphs-hold-the-policy-as-operators
def open_channel(channel: Channel) -> tuple[int, Tensor]:
    """Register ``channel`` for as long as it lives; return its key, and that as a tensor."""
    key = next(_numbers)
    _channels[key] = channel
    with unseen():
        return key, scalar(key)


def _channel(number: Tensor) -> Channel:
    found = _channels.get(int(number))
    if found is None:
        raise RuntimeError(
            f"distnorm: this graph was traced in training mode and shares statistics for layer number {int(number)} of "
            "the process that traced it, but the model is gone, or this is another process. Keep the model while its "
            "graph trains; to save a graph, export the model in eval(), or convert and compile it where it trains."
        )
    return found


@torch.library.custom_op("distnorm::statistics", mutates_args=())
def statistics_op(wire: Tensor, number: Tensor, learning: bool) -> Tensor:
    """``Channel.statistics``, in the current step."""
    return _channel(number).statistics(wire, NOW, learning=learning, held=False).shared.clone()


@torch.library.custom_op("distnorm::cotangents", mutates_args=())
def cotangents_op(wire: Tensor, count: Tensor, number: Tensor) -> Tensor:
    """``Channel.cotangents``, in the current step."""
    return _channel(number).cotangents(wire, count, NOW, learning=True).clone()


@torch.library.custom_op("distnorm::lands", mutates_args=())
def lands_op(count: Tensor, number: Tensor, learning: bool) -> Tensor:
    """1 where the statistics that came with ``count`` are fit for the running statistics, else 0, in its dtype."""
    return torch.full_like(count, _channel(number).lands(NOW, learning=learning))


@torch.library.custom_op("distnorm::absorb", mutates_args=())
def absorb_op(shared: Tensor, number: Tensor, learning: bool) -> None:
    """``Channel.absorb``, but in repetitions. For dispatch modes: a compiled graph must see what changes."""
    if not repeating():
        _channel(number).absorb(shared, learning=learning)


@torch.library.custom_op("distnorm::running", mutates_args=())
def running_op(mean_C: Tensor, var_C: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """``Channel.ahead`` of the buffers ``mean_C`` and ``var_C``, as copies."""
    mean_C, var_C = _channel(number).ahead(mean_C, var_C)
    return mean_C.clone(), var_C.clone()


@running_op.register_fake
def _(mean_C: Tensor, var_C: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean_C), torch.empty_like(var_C)


@statistics_op.register_fake
def _(wire: Tensor, number: Tensor, learning: bool) -> Tensor:
    return torch.empty_like(wire)


@cotangents_op.register_fake
def _(wire: Tensor, count: Tensor, number: Tensor) -> Tensor:
    return torch.empty_like(wire)


@lands_op.register_fake
def _(count: Tensor, number: Tensor, learning: bool) -> Tensor:
    return torch.empty_like(count)


@absorb_op.register_fake
def _(shared: Tensor, number: Tensor, learning: bool) -> None:
    return None


def scalar(key: int) -> Tensor:
    """The key of a channel as a tensor, of the mode that looks on if there is one."""
    return torch.full((), key, dtype=torch.int64, device="cpu")


def absorb_unseen(channel: Channel, shared: Tensor) -> None:
    """``channel.absorb``, as one operation for a dispatch mode, unless a forward is repeated."""
    torch.ops.distnorm.absorb(shared, scalar(channel.key), backward_may_follow())
