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
from distnorm.types import Affine

_WRITTEN_OUT = Formula("batch_norm", kinds=2)


@final
@dataclass(frozen=True, kw_only=True)
class BatchNorm(ChannelAffine):
    """Centre and scale by the batch's mean and biased variance; running_var is updated with the unbiased variance."""

    raw: ClassVar[slice] = slice(0, 2)

    def formula(self, affine: Affine | None = None) -> Formula:
        """Return its formula in arithmetic.c and kernels/gradients.py."""
        return _WRITTEN_OUT

    def link(self, means_KC: Tensor, eps: float) -> Tensor:
        """Return ``(mean, log(var + eps) / 2)``: location and log-scale."""
        mean_C, square_C = means_KC.unbind()
        var_C = (square_C - mean_C.square()).clamp_min(0)
        return torch.stack((mean_C, (var_C + eps).log() / 2))

    def coefficients(self, theta_KC: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
        """Return ``scale = weight / sqrt(var + eps)``, ``shift = bias - mean * scale``."""
        mean_C, log_std_C = theta_KC.unbind()
        scale_C = torch.exp(-log_std_C)
        if affine.weight_C is not None:
            scale_C = scale_C * affine.weight_C
        shift_C = -mean_C * scale_C
        return scale_C, shift_C if affine.bias_C is None else shift_C + affine.bias_C

    def moments(self, means_KC: Tensor, count: Tensor) -> dict[str, Tensor]:
        """Return mean and unbiased variance."""
        mean_C, square_C = means_KC.unbind()
        var_C = (square_C - mean_C.square()).clamp_min(0)
        return {"running_mean": mean_C, "running_var": var_C * (count / (count - 1).clamp_min(1))}
