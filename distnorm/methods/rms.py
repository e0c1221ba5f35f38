"""RMS: unit second moment per channel, no centring.

    y = x / sqrt(mean(x^2) + eps) * weight + bias

Shares one sum per channel forward, one cotangent backward. It is the normalizer inside MABN (Yan et al., "Towards
Stabilizing Batch Statistics in Backward Propagation of Batch Normalization", ICLR 2020); there the weights of the
convolution before it are centred, which stands in for the missing mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from distnorm.methods.base import ChannelAffine
from distnorm.types import Affine, Moments


@final
@dataclass(frozen=True, kw_only=True)
class RMS(ChannelAffine):
    """Scale by the batch's root mean square; running_var tracks the second moment, running_mean stays 0."""

    centred: ClassVar[bool] = False
    raw: ClassVar[slice] = slice(1, 2)

    def link(self, means_KC: Tensor, eps: float) -> Tensor:
        """``log(mean(x^2) + eps) / 2``."""
        return (means_KC + eps).log() / 2

    def coefficients(self, theta_KC: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
        """``scale = weight / sqrt(mean(x^2) + eps)``, ``shift = bias``."""
        scale_C = torch.exp(-theta_KC[0])
        if affine.weight_C is not None:
            scale_C = scale_C * affine.weight_C
        shift_C = torch.zeros_like(scale_C) if affine.bias_C is None else affine.bias_C.to(scale_C.dtype)
        return scale_C, shift_C

    def moments(self, means_KC: Tensor, count: Tensor) -> Moments:
        """The second moment, as the variance about a mean that is 0."""
        return Moments(None, means_KC[0])
