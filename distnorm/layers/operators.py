"""The policy as opaque operators, for compiled graphs and dispatch modes.

Graphs contain numbers, not objects: an operator looks up its layer when it runs, and acts in the current step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distnorm.autograd.engine import repeating
from distnorm.kernels.absorbing import absorb_shared
from distnorm.layers.line import Line, open_line
from distnorm.layers.running_statistics import running_of
from distnorm.layers.site import Site


# docs/decisions.md#compiled-graphs-hold-the-policy-as-operators
@torch.library.custom_op("distnorm::statistics", mutates_args=())
def statistics_op(wire: Tensor, number: Tensor, learning: bool) -> Tensor:
    """Call ``Line.gather``."""
    return open_line(Site.of(number), opaque=False, learning=learning).gather(wire, held=False).clone()


@torch.library.custom_op("distnorm::cotangents", mutates_args=())
def cotangents_op(wire: Tensor, count: Tensor, number: Tensor) -> Tensor:
    """Call ``Line.scatter``, and wait for the result."""
    return _now(number, True).start_cotangents(wire, count, learning=True).wait().clone()


@torch.library.custom_op("distnorm::lands", mutates_args=())
def lands_op(count: Tensor, number: Tensor, learning: bool) -> Tensor:
    """Return 1 if the statistics with ``count`` are to update the running statistics, else 0, in its dtype."""
    return torch.full_like(count, _now(number, learning).step_lands())


@torch.library.custom_op("distnorm::absorb", mutates_args=())
def absorb_op(shared: Tensor, number: Tensor, learning: bool) -> None:
    """Update the running statistics with the ``shared`` sums and count of the current step, if they are global.

    Repetitions change nothing. For dispatch modes only: a compiled graph must see which buffers change.
    """
    site = Site.of(number)
    layer = site.conversion.layer(site.index)
    if layer is not None and not repeating() and _now(number, learning).step_lands():
        running = running_of(layer, guarded=site.conversion.guards)
        absorb_shared(site.conversion.recipe.method, shared, running, layer.num_features)


@torch.library.custom_op("distnorm::running", mutates_args=())
def running_op(mean_C: Tensor, var_C: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Site.ahead`` of the buffers ``mean_C`` and ``var_C``, as copies."""
    mean_C, var_C = Site.of(number).ahead(mean_C, var_C)
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


def _now(number: Tensor, learning: bool) -> Line:
    site = Site.of(number)
    binding = site.conversion.bound()
    return Line(site, binding, binding.step, opaque=False, learning=learning)
