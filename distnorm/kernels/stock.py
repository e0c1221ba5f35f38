"""Torch's own batch norm, for layers that share nothing and are so small that Python costs more than their arithmetic.

An autograd Function in Python takes longer than torch's whole batch norm of a few thousand values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from distnorm.compat.dispatch_state import saved_tensors_hooks
from distnorm.kernels.arithmetic import Tracked
from distnorm.types import Affine, Running

FEW_VALUES = 2**16
"""Up to this number of values torch's batch norm is at least as fast as the C kernels (docs/performance.md).
"""


# docs/decisions.md#torchs-batch-norm-for-small-layers
def suits(method: Tracked, x_NCL: Tensor, affine: Affine, running: Running) -> bool:
    """Return whether torch's batch norm computes what ``method`` does for this plain input, and sooner."""
    formula = method.formula()
    if formula is None or formula.name != "batch_norm" or not 0 < x_NCL.numel() <= FEW_VALUES:
        return False
    if running.momentum is None and not x_NCL.is_cpu:  # the host would wait for the number of updates
        return False
    for each in (x_NCL, affine.weight_C, affine.bias_C, running.mean_C, running.var_C):
        if each is not None and each.dtype is not torch.float32:
            return False
    return True


def batch_norm(
    x_NCL: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    mean_C: Tensor | None,
    var_C: Tensor | None,
    count: Tensor | None,
    rate: float | None,
    eps: float,
    *,
    updates_running: bool,
) -> Tensor:
    """Normalize ``x_NCL`` by the mean and variance of this batch. At least two values per channel.

    ``updates_running``: also update the running ``mean_C`` and ``var_C`` and their ``count`` of updates, if there are
    any, at the ``rate`` that torch calls momentum.
    """
    if mean_C is None or var_C is None:
        mean_C = var_C = None
    elif updates_running:
        # torch's operation changes them unseen, and keeps them, unused, for its backward pass. Graphs of evaluation
        # must notice the change, and those of other training forwards must not: these keep tensors of other versions.
        increment_version((mean_C, var_C))
        mean_C, var_C = mean_C.data, var_C.data
    else:  # a checkpoint expects that its repetition saves as many tensors
        mean_C, var_C = mean_C.clone(), var_C.clone()
    if updates_running and count is not None:
        count.add_(1)
    momentum = rate if rate is not None else 0.0 if count is None else 1.0 / float(count)
    arguments = weight_C, bias_C, mean_C, var_C, True, momentum, eps, torch.backends.cudnn.enabled
    hooks = saved_tensors_hooks()
    if hooks is None:
        return torch.batch_norm(x_NCL, *arguments)
    with torch.autograd.graph.saved_tensors_hooks(*_keeping_dtypes(*hooks)):
        return torch.batch_norm(x_NCL, *arguments)


def _keeping_dtypes(
    pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]
) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Return these hooks, with the result of ``unpack`` in the dtype that was saved, as torch's backward needs."""
    return lambda saved: (saved.dtype, pack(saved)), lambda packed: unpack(packed[1]).to(packed[0])
