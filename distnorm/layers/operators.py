"""The policy as opaque operators, for compiled graphs and dispatch modes.

Graphs contain numbers, not objects: an operator looks up its layer when it runs, and acts in the current step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distnorm.autograd.engine import repeating
from distnorm.kernels.running import update_from_sums
from distnorm.layers.line import Line, open_line
from distnorm.layers.running_statistics import running_of
from distnorm.layers.site import Site


# docs/decisions.md#compiled-graphs-hold-the-policy-as-operators
@torch.library.custom_op("distnorm::statistics", mutates_args=())
def statistics_op(payload: Tensor, number: Tensor, learning: bool) -> Tensor:
    """Call ``Line.gather``."""
    return open_line(Site.of(number), opaque=False, learning=learning).gather(payload, in_graph=False).clone()


@torch.library.custom_op("distnorm::cotangents", mutates_args=())
def cotangents_op(payload: Tensor, count: Tensor, number: Tensor) -> Tensor:
    """Call ``Line.scatter``, and wait for the result."""
    return _now(number, True).start_cotangents(payload, count, learning=True).wait().clone()


@torch.library.custom_op("distnorm::is_global", mutates_args=())
def is_global_op(count: Tensor, number: Tensor, learning: bool) -> Tensor:
    """Return 1 if the statistics with ``count`` are to update the running statistics, else 0, in its dtype."""
    return torch.full_like(count, _now(number, learning).step_is_global())


@torch.library.custom_op("distnorm::update_running", mutates_args=())
def update_running_op(shared: Tensor, number: Tensor, learning: bool) -> None:
    """Update the running statistics with the ``shared`` sums and count of the current step, if they are global.

    Repetitions change nothing. For dispatch modes only: a compiled graph must see which buffers change.
    """
    site = Site.of(number)
    layer = site.conversion.layer(site.index)
    if layer is not None and not repeating() and _now(number, learning).step_is_global():
        running = running_of(layer, guarded=site.conversion.guards)
        update_from_sums(site.conversion.recipe.method, shared, running, layer.num_features)


@torch.library.custom_op("distnorm::running", mutates_args=())
def running_op(mean_C: Tensor, var_C: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``Site.ahead`` of the buffers ``mean_C`` and ``var_C``, as copies."""
    mean_C, var_C = Site.of(number).ahead(mean_C, var_C)
    return mean_C.clone(), var_C.clone()


@running_op.register_fake
def _(mean_C: Tensor, var_C: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean_C), torch.empty_like(var_C)


@statistics_op.register_fake
def _(payload: Tensor, number: Tensor, learning: bool) -> Tensor:
    return torch.empty_like(payload)


@cotangents_op.register_fake
def _(payload: Tensor, count: Tensor, number: Tensor) -> Tensor:
    return torch.empty_like(payload)


@is_global_op.register_fake
def _(count: Tensor, number: Tensor, learning: bool) -> Tensor:
    return torch.empty_like(count)


@update_running_op.register_fake
def _(shared: Tensor, number: Tensor, learning: bool) -> None:
    return None


def _now(number: Tensor, learning: bool) -> Line:
    site = Site.of(number)
    binding = site.conversion.bound()
    return Line(site, binding, binding.step, opaque=False, learning=learning)
