"""Repeated forwards of a small layer that shares nothing: a few comparisons, then torch's batch norm.

What ``DistNorm.forward`` has to know of its tensors, modes and ranks takes Python longer than torch's batch norm takes
for a few thousand values. The first forward that comes to torch's batch norm notes what that rested on. The next ones
compare, and go the whole way again if anything differs.

Shapes: x_NCL; weight_C, bias_C and the running statistics.
"""

from __future__ import annotations

from types import NoneType

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.autograd.engine import NO_BACKWARD, graph_task
from distnorm.compat.dispatch_state import saved_tensors_hooks
from distnorm.kernels import stock
from distnorm.layers.conversion import Conversion
from distnorm.types import Affine, Running


# docs/decisions.md#torchs-batch-norm-for-small-layers
class Small:
    """What the last forward of a layer by torch's batch norm rested on."""

    __slots__ = "_affine", "_binding", "_conversion", "_floats", "_name", "_running", "_shape"

    def __init__(self, conversion: Conversion, name: str, x_NCL: Tensor, affine: Affine, running: Running) -> None:
        """Note what the forward of ``x_NCL`` rests on, which has updated the ``running`` statistics."""
        self._shape, self._affine, self._running = x_NCL.shape, affine, running
        self._conversion, self._binding, self._name = conversion, conversion.binding, name
        values = affine.weight_C, affine.bias_C, running.mean_C, running.var_C
        self._floats = [each for each in values if each is not None]

    def batch_norm(self, layer: _BatchNorm, x_NCL: Tensor) -> Tensor | None:
        """Normalize ``x_NCL``, a plain tensor; None, and nothing has happened, if anything but values has changed."""
        affine, running = self._affine, self._running
        if not layer.training or x_NCL.dtype is not torch.float32 or x_NCL.shape != self._shape:
            return None
        if layer.eps != affine.eps or layer.momentum != running.momentum:
            return None
        parameters, buffers = layer._parameters, layer._buffers
        if parameters.get("weight") is not affine.weight_C or parameters.get("bias") is not affine.bias_C:
            return None
        if buffers.get("running_mean") is not running.mean_C or buffers.get("running_var") is not running.var_C:
            return None
        if buffers.get("num_batches_tracked") is not running.updates or not layer.track_running_stats:
            return None
        for each in self._floats:
            if each.dtype is not torch.float32:  # modules are cast in place
                return None
        # Hooks on saved tensors, and repetitions in a backward pass, take the whole way.
        if saved_tensors_hooks() is not None or graph_task() != NO_BACKWARD:
            return None
        binding = self._conversion.bound()
        if binding is not self._binding:
            return None
        binding.forward_begins(self._name)
        return stock.batch_norm(x_NCL, affine, running, updates=True)


def note(
    conversion: Conversion, name: str, layer: _BatchNorm, x_NCL: Tensor, affine: Affine, running: Running
) -> Small | None:
    """Note a forward that has updated the ``running`` statistics; None if the layer is not as a stock one.

    The tensors of such a layer are where torch puts them, and it has all running statistics.
    """
    parameters, buffers = layer._parameters, layer._buffers
    if not {type(affine.weight_C), type(affine.bias_C)} <= {Parameter, NoneType}:
        return None  # others, such as those of a functional call, may belong to a graph, and are not kept alive
    stored = parameters.get("weight") is affine.weight_C and parameters.get("bias") is affine.bias_C
    stored = stored and buffers.get("running_mean") is running.mean_C is not None
    stored = stored and buffers.get("running_var") is running.var_C is not None
    stored = stored and buffers.get("num_batches_tracked") is running.updates is not None
    tracks = layer.track_running_stats and running.momentum is not None
    return Small(conversion, name, x_NCL, affine, running) if stored and tracks else None
