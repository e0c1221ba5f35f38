"""BatchNorm: zero mean and unit variance per channel.

    y = (x - mean) / sqrt(var + eps) * weight + bias,     var = mean(x^2) - mean^2  (biased)

Shares two sums per channel forward, two cotangents backward. Ioffe & Szegedy, "Batch Normalization: Accelerating Deep
Network Training by Reducing Internal Covariate Shift", 2015, algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from distnorm.kernels.arithmetic import Formula
from distnorm.methods.base import ChannelAffine
from distnorm.types import Affine, Moments


@final
@dataclass(frozen=True, kw_only=True)
class BatchNorm(ChannelAffine):
    """Centre and scale by the batch's mean and biased variance; running_var absorbs the unbiased one."""

    raw: ClassVar[slice] = slice(0, 2)

    def formula(self, affine: Affine | None = None) -> Formula:
        """Written out in arithmetic.c."""
        return Formula("batch_norm", kinds=2)

    def link(self, means_KC: Tensor, eps: float) -> Tensor:
        """``(mean, log(var + eps) / 2)``: location and log-scale."""
        mean_C, square_C = means_KC.unbind()
        var_C = (square_C - mean_C.square()).clamp_min(0)
        return torch.stack((mean_C, (var_C + eps).log() / 2))

    def coefficients(self, theta_KC: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
        """``scale = weight / sqrt(var + eps)``, ``shift = bias - mean * scale``."""
        mean_C, log_std_C = theta_KC.unbind()
        scale_C = torch.exp(-log_std_C)
        if affine.weight_C is not None:
            scale_C = scale_C * affine.weight_C
        shift_C = -mean_C * scale_C
        return scale_C, shift_C if affine.bias_C is None else shift_C + affine.bias_C

    def pull(
        self, theta_KC: Tensor, affine: Affine, scale_grad_C: Tensor, shift_grad_C: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """``d mean = -scale dshift``, ``d log_std = -scale (dscale - mean dshift)``."""
        mean_C, log_std_C = theta_KC.unbind()
        invstd_C = torch.exp(-log_std_C)
        slope_C = -invstd_C if affine.weight_C is None else -invstd_C * affine.weight_C
        centred_C = scale_grad_C - mean_C * shift_grad_C
        return torch.stack((slope_C * shift_grad_C, slope_C * centred_C)), invstd_C.mul_(centred_C), shift_grad_C

    def pull_link(self, means_KC: Tensor, theta_KC: Tensor, theta_grad_KC: Tensor, eps: float) -> Tensor:
        """``d square = d log_std / (2 (var + eps))``, ``d mean' = d mean - 2 mean d square``."""
        mean_C, log_std_C = theta_KC.unbind()
        mean_grad_C, log_std_grad_C = theta_grad_KC.unbind()
        square_grad_C = torch.exp(-2 * log_std_C).mul_(log_std_grad_C).div_(2)
        return torch.stack((torch.addcmul(mean_grad_C, mean_C, square_grad_C, value=-2), square_grad_C))

    def moments(self, means_KC: Tensor, count: Tensor) -> Moments:
        """Mean and unbiased variance."""
        mean_C, square_C = means_KC.unbind()
        var_C = (square_C - mean_C.square()).clamp_min(0)
        return Moments(mean_C, var_C * (count / (count - 1).clamp_min(1)))
