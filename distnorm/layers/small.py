"""Repeated forwards of a small layer that shares nothing: a few comparisons, then torch's batch norm.

What ``DistNorm.forward`` has to know of its tensors, modes and ranks takes Python longer than torch's batch norm takes
for a few thousand values. The first forward that comes to torch's batch norm notes what that rested on. The next ones
compare, and go the whole way again if anything differs.

Shapes: x_NCL; weight_C, bias_C and the running statistics.
"""

from __future__ import annotations

from types import NoneType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Parameter

from distnorm.autograd.engine import NO_BACKWARD, graph_task
from distnorm.compat.dispatch_state import are_plain, saved_tensors_hooks
from distnorm.kernels import stock
from distnorm.types import Affine, Running

if TYPE_CHECKING:
    from distnorm.layers.module import DistNorm


# docs/decisions.md#torchs-batch-norm-for-small-layers
class Small:
    """What the last forward of a layer by torch's batch norm rested on."""

    __slots__ = "_affine", "_binding", "_buffers", "_floats", "_name", "_parameters", "_running", "_shape"

    def __init__(self, layer: DistNorm, x_NCL: Tensor, affine: Affine, running: Running) -> None:
        """Note what the forward of ``x_NCL`` rests on, which has updated the ``running`` statistics."""
        self._shape, self._affine, self._running = x_NCL.shape, affine, running
        self._binding, self._name = layer._site.conversion.binding, layer._site.name
        self._parameters = affine.weight_C, affine.bias_C
        self._buffers = running.mean_C, running.var_C, running.updates
        values = affine.weight_C, affine.bias_C, running.mean_C, running.var_C
        self._floats = [each for each in values if each is not None]

    @staticmethod
    def suits(layer: DistNorm, affine: Affine, running: Running) -> bool:
        """Return whether the layer's tensors are those of a stock layer, which has all running statistics."""
        parameters, buffers = layer._parameters, layer._buffers
        if not {type(affine.weight_C), type(affine.bias_C)} <= {Parameter, NoneType}:
            return False  # others, such as those of a functional call, may belong to a graph, and are not kept alive
        stored = parameters.get("weight") is affine.weight_C and parameters.get("bias") is affine.bias_C
        stored = stored and buffers.get("running_mean") is running.mean_C is not None
        stored = stored and buffers.get("running_var") is running.var_C is not None
        stored = stored and buffers.get("num_batches_tracked") is running.updates is not None
        return stored and layer.track_running_stats and running.momentum is not None

    def batch_norm(self, layer: DistNorm, x_NCL: Tensor, residual_NCL: Tensor | None) -> Tensor | None:
        """Normalize ``x_NCL`` as before; None, and nothing has happened, if anything but values is not as it was.

        ``residual_NCL``, which may be of any kind, will be added to the result.
        """
        if not layer.training or not are_plain(x_NCL, residual_NCL) or x_NCL.dtype is not torch.float32:
            return None
        affine, running = self._affine, self._running
        if x_NCL.shape != self._shape or layer.eps != affine.eps or layer.momentum != running.momentum:
            return None
        parameters, buffers = layer._parameters, layer._buffers
        weight_C, bias_C = self._parameters
        if parameters.get("weight") is not weight_C or parameters.get("bias") is not bias_C:
            return None
        mean_C, var_C, updates = self._buffers
        if buffers.get("running_mean") is not mean_C or buffers.get("running_var") is not var_C:
            return None
        if buffers.get("num_batches_tracked") is not updates or not layer.track_running_stats:
            return None
        for each in self._floats:
            if each.dtype is not torch.float32:  # modules are cast in place
                return None
        # Hooks on saved tensors, and repetitions in a backward pass, take the whole way.
        if saved_tensors_hooks() is not None or graph_task() != NO_BACKWARD:
            return None
        binding = layer._site.conversion.bound()
        if binding is not self._binding:
            return None
        binding.forward_begins(self._name)
        return stock.batch_norm(x_NCL, affine, running, updates=True)
