"""Batch norm that shares nothing: torch's own does it, except where its statistics are slow.

On a CPU, torch's training-mode statistics of contiguous images take most of its forward (torch 2.13); there the
statistics come from ``kernels.aten`` and the rest stays torch's. Everything is torch's to differentiate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm import running
from distnorm.kernels import aten
from distnorm.methods.base import compute_dtype
from distnorm.types import Moments


def normalize(layer: _BatchNorm, x_NCL: Tensor, *, track: bool) -> Tensor:
    """Training-mode batch norm of ``x_NCL`` by its own statistics, as ``layer`` parametrizes it.

    ``track`` says whether the running statistics, if any, absorb them. No collective.
    """
    tracked = track and layer.running_mean is not None
    weight_C, bias_C = (_wide(each) for each in (layer.weight, layer.bias))
    if x_NCL.dim() > 2 and x_NCL.is_contiguous() and x_NCL.dtype == compute_dtype(x_NCL.dtype):
        y_NCL: Tensor = _Normalize.apply(x_NCL, weight_C, bias_C, layer, tracked)
        return y_NCL
    # Without running statistics: torch would keep those buffers for its backward, and object to their next update.
    y_NCL, mean_C, invstd_C = torch.native_batch_norm(x_NCL, weight_C, bias_C, None, None, True, 0.0, layer.eps)
    if tracked:
        with torch.no_grad():
            count = x_NCL.numel() // x_NCL.shape[1]
            var_C = invstd_C.pow(-2).sub_(layer.eps).clamp_min_(0)
            running.absorb_known(layer, Moments(mean_C, var_C.mul_(count / (count - 1))))
    return y_NCL


def _wide(parameter_C: Tensor | None) -> Tensor | None:
    return None if parameter_C is None else parameter_C.to(compute_dtype(parameter_C.dtype))


class _Normalize(torch.autograd.Function):
    """``y = (x - mean) / sqrt(var + eps) * weight + bias``."""

    @staticmethod
    def forward(
        ctx: Any, x_NCL: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, layer: _BatchNorm, tracked: bool
    ) -> Tensor:
        """Two passes: statistics, then torch's inference-mode batch norm by them."""
        wide_mean_C, wide_var_C, y_NCL = aten.moments(x_NCL)
        mean_C, var_C = wide_mean_C.to(x_NCL.dtype), wide_var_C.to(x_NCL.dtype)
        ctx.eps = layer.eps
        ctx.save_for_backward(x_NCL, weight_C, mean_C, (wide_var_C + layer.eps).rsqrt_().to(x_NCL.dtype))
        y_NCL = aten.normalize(x_NCL, mean_C, var_C, weight_C, bias_C, layer.eps, into=y_NCL)
        if tracked:
            count = x_NCL.numel() // x_NCL.shape[1]
            running.absorb_known(layer, Moments(mean_C, var_C * (count / (count - 1))))
        return y_NCL

    @staticmethod
    def backward(ctx: Any, dy_NCL: Tensor) -> tuple[Tensor | None, ...]:
        """Torch's backward of training-mode batch norm, which torch can differentiate again."""
        x_NCL, weight_C, mean_C, invstd_C = ctx.saved_tensors
        needed = list(ctx.needs_input_grad[:3])
        gradients = torch.ops.aten.native_batch_norm_backward(
            dy_NCL, x_NCL, weight_C, None, None, mean_C, invstd_C, True, ctx.eps, needed
        )
        return *gradients, None, None
