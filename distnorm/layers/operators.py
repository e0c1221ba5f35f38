"""The policy as opaque operators, for compiled graphs and dispatch modes.

Graphs contain numbers, not objects: an operator looks up its layer when it runs, and acts in the current step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distnorm.autograd.engine import repeating
from distnorm.layers.line import Line, open_line
from distnorm.layers.running_statistics import running_of
from distnorm.layers.site import Site, update_layer


# docs/decisions.md#compiled-graphs-hold-the-policy-as-operators
@torch.library.custom_op("distnorm::statistics", mutates_args=())
def statistics_op(payload: Tensor, number: Tensor, learning: bool, name: str, op: str) -> Tensor:
    """Call ``Line.gather``."""
    line = open_line(Site.of(number), opaque=False, learning=learning)
    return line.gather(payload, in_graph=False, name=name, op="max" if op == "max" else "sum").clone()


@torch.library.custom_op("distnorm::cotangents", mutates_args=())
def cotangents_op(payload: Tensor, count: Tensor, number: Tensor, name: str) -> Tensor:
    """Call ``Line.start_cotangents``, and wait for the result."""
    return _now(number, True).start_cotangents(payload, count, learning=True, name=name).wait().clone()


@torch.library.custom_op("distnorm::is_global", mutates_args=())
def is_global_op(count: Tensor, number: Tensor, learning: bool) -> Tensor:
    """Return 1 if the statistics with ``count`` are to update the running statistics, else 0, in its dtype."""
    return torch.full_like(count, _now(number, learning).step_is_global())


@torch.library.custom_op("distnorm::update_running", mutates_args=())
def update_running_op(shared: list[Tensor], number: Tensor, learning: bool) -> None:
    """Update the running statistics with what was ``shared`` in the current step, by each share, if it is global.

    Repetitions change nothing. For dispatch modes only: a compiled graph must see which buffers change.
    """
    site = Site.of(number)
    layer = site.conversion.layer(site.index)
    if layer is not None and not repeating() and _now(number, learning).step_is_global():
        running = running_of(layer, guarded=site.conversion.guards)
        update_layer(layer, running, site, shared)


@torch.library.custom_op("distnorm::running", mutates_args=())
def running_op(buffers: list[Tensor], number: Tensor) -> list[Tensor]:
    """Return ``Site.ahead`` of the ``buffers``, as copies."""
    return [each.clone() for each in Site.of(number).ahead(buffers)]


@torch.library.custom_op("distnorm::copies", mutates_args=())
def copies_op(buffers: list[Tensor]) -> list[Tensor]:
    """Return copies of ``buffers``."""
    return [each.clone() for each in buffers]


@copies_op.register_fake
def _(buffers: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(each) for each in buffers]


@running_op.register_fake
def _(buffers: list[Tensor], number: Tensor) -> list[Tensor]:
    return [torch.empty_like(each) for each in buffers]


@statistics_op.register_fake
def _(payload: Tensor, number: Tensor, learning: bool, name: str, op: str) -> Tensor:
    return torch.empty_like(payload)


@cotangents_op.register_fake
def _(payload: Tensor, count: Tensor, number: Tensor, name: str) -> Tensor:
    return torch.empty_like(payload)


@is_global_op.register_fake
def _(count: Tensor, number: Tensor, learning: bool) -> Tensor:
    return torch.empty_like(count)


@update_running_op.register_fake
def _(shared: list[Tensor], number: Tensor, learning: bool) -> None:
    return None


def _now(number: Tensor, learning: bool) -> Line:
    site = Site.of(number)
    binding = site.conversion.bound()
    return Line(site, binding, binding.step, opaque=False, learning=learning)
