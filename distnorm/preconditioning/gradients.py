"""The product ``P P^T g`` of a layer's preconditioner and its gradient, without forming P (docs/bnp.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from distnorm.preconditioning.statistics import Moments


def precondition_(weight: Tensor, bias: Tensor, moments: Moments, groups: int, damping: float, eps: float) -> None:
    """Replace the gradients ``weight [out, in / groups, *kernel]`` and ``bias [out]`` by ``P P^T g``, in place.

    They stay as they are where ``moments`` has seen nothing.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    seen = moments.values > 0
    damped_C = torch.where(seen, moments.var_C + damping * moments.var_C.max() + eps, 1.0)
    # One row per group, output channel of it, input channel of it, and place in the kernel.
    mean, damped = (each.to(weight.device, dtype).view(groups, 1, -1, 1) for each in (moments.mean_C * seen, damped_C))
    g_bias = bias.to(dtype).view(groups, -1, 1, 1)
    g_weight = weight.to(dtype).reshape(groups, g_bias.shape[1], mean.shape[2], -1)
    new_weight = (g_weight - mean * g_bias) / damped
    new_bias = g_bias - (mean * new_weight).sum((2, 3), keepdim=True)
    weight.copy_(new_weight.reshape(weight.shape))
    bias.copy_(new_bias.reshape(bias.shape))


def scale_(weight: Tensor, bias: Tensor, moments: Moments) -> None:
    """Multiply both gradients by ``1 / q^2 = min(N / fan_in, 1)``, N the values per channel; by 1 if there are none."""
    fan_in = weight[0].numel()
    factor = torch.where(moments.values > 0, (moments.values / fan_in).clamp_max(1), 1.0)
    for each in (weight, bias):
        each.mul_(factor.to(each.device, torch.promote_types(each.dtype, torch.float32)))
