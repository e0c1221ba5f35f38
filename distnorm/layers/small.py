"""Repeated forwards of a small layer that shares nothing: a few comparisons, then torch's batch norm.

What ``DistNorm.forward`` has to know of its tensors, modes and ranks takes Python longer than torch's batch norm takes
for a few thousand values. The first forward that comes to torch's batch norm notes what its input was and what it was
bound to. The next ones compare, look at the layer's tensors, and go the whole way again if anything does not suit. No
tensor is noted: it would be kept alive.

Shapes: x_NCL; weight_C, bias_C and the running statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.autograd.engine import NO_BACKWARD, graph_task
from distnorm.compat.dispatch_state import are_own, saved_tensors_hooks
from distnorm.kernels import stock
from distnorm.layers.conversion import Conversion


def may_be_repeated() -> bool:
    """Return whether a checkpoint may repeat this forward, or this is a repetition: both must save the same tensors."""
    return saved_tensors_hooks() is not None or graph_task() != NO_BACKWARD


# docs/decisions.md#torchs-batch-norm-for-small-layers
class Small:
    """A forward by torch's batch norm."""

    __slots__ = "_binding", "_conversion", "_name", "_shape"

    def __init__(self, conversion: Conversion, name: str, x_NCL: Tensor) -> None:
        """Note the forward of ``x_NCL`` in the layer ``name``, which is bound."""
        self._shape = x_NCL.shape
        self._conversion, self._binding, self._name = conversion, conversion.binding, name

    def batch_norm(self, layer: _BatchNorm, x_NCL: Tensor) -> Tensor | None:
        """Normalize ``x_NCL``, a plain tensor, in the same way; None, and nothing has happened, if it does not suit."""
        if not layer.training or x_NCL.dtype is not torch.float32 or x_NCL.shape != self._shape:
            return None
        parameters, buffers, momentum, eps = layer._parameters, layer._buffers, layer.momentum, layer.eps
        if not layer.track_running_stats or momentum is None or eps <= 0:
            return None
        if not ("weight" in parameters and "bias" in parameters and "num_batches_tracked" in buffers):
            return None
        if not ("running_mean" in buffers and "running_var" in buffers):
            return None
        weight_C, bias_C, updates = parameters["weight"], parameters["bias"], buffers["num_batches_tracked"]
        mean_C, var_C = buffers["running_mean"], buffers["running_var"]
        if mean_C is None or var_C is None or updates is None or not are_own(weight_C, bias_C, mean_C, var_C, updates):
            return None
        for each in (weight_C, bias_C, mean_C, var_C):
            if each is not None and each.dtype is not torch.float32:
                return None
        if may_be_repeated():
            return None
        try:
            layer._check_input_dim(x_NCL)
        except ValueError:
            return None  # which raises it again, with the layer's name
        binding = self._conversion.bound()
        if binding is not self._binding:
            return None
        binding.forward_begins(self._name)
        return stock.batch_norm(x_NCL, weight_C, bias_C, mean_C, var_C, updates, momentum, eps, updates_running=True)
