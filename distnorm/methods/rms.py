"""RMS: unit second moment per channel, no centring.

    y = x / sqrt(mean(x^2) + eps) * weight + bias

Shares one sum per channel forward, one cotangent backward. It is the normalizer inside MABN (Yan et al., "Towards
Stabilizing Batch Statistics in Backward Propagation of Batch Normalization", ICLR 2020). There the weights of the
preceding convolution are centred, which replaces subtracting the mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from distnorm.kernels.arithmetic import Formula
from distnorm.methods.base import ChannelAffine
from distnorm.types import Affine
from distnorm.validation import Clip, Steps, check_fields

_WRITTEN_OUT = Formula("rms", kinds=1)


@final
@dataclass(frozen=True, kw_only=True)
class RMS(ChannelAffine):
    """Scale by the batch's root mean square; running_var tracks the second moment, running_mean stays 0.

    Args:
        clip: if given, y is multiplied by r = sqrt(mean(x^2) + eps) / sqrt(running_var + eps), clipped to
            [1 / clip, clip] and constant in autograd. Except for outliers, training then normalizes as evaluation does.
            MABN uses 5.
        clip_after: the number of updates of running_var before which r is 1.
    """

    centred: ClassVar[bool] = False
    raw: ClassVar[slice] = slice(1, 2)
    clip: Clip | None = None
    clip_after: Steps = 1000

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)

    @property
    def follows(self) -> bool:
        """Return whether there is a clip."""
        return self.clip is not None

    def formula(self, affine: Affine | None = None) -> Formula:
        """Return its formula in arithmetic.c and kernels/gradients.py, with the correction if it applies by now."""
        if self.clip is None or affine is None or affine.running_var_C is None or affine.updates is None:
            return _WRITTEN_OUT
        if affine.updates.is_cpu and int(affine.updates) < self.clip_after:
            return _WRITTEN_OUT
        return Formula("rms", 1, affine.running_var_C, self.clip, affine.updates, self.clip_after)

    def link(self, means_KC: Tensor, eps: float) -> Tensor:
        """Return ``log(mean(x^2) + eps) / 2``."""
        return (means_KC + eps).log() / 2

    def coefficients(self, theta_KC: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
        """Return ``scale = weight / sqrt(mean(x^2) + eps)``, ``shift = bias``."""
        scale_C = torch.exp(-theta_KC[0]) * self._correction(theta_KC[0], affine)
        if affine.weight_C is not None:
            scale_C = scale_C * affine.weight_C
        shift_C = torch.zeros_like(scale_C) if affine.bias_C is None else affine.bias_C.to(scale_C.dtype)
        return scale_C, shift_C

    def _correction(self, log_rms_C: Tensor, affine: Affine) -> Tensor | float:
        if self.clip is None or affine.running_var_C is None or affine.updates is None:
            return 1.0
        running_C = (affine.running_var_C.to(log_rms_C.dtype) + affine.eps).log() / 2
        ratio_C = (log_rms_C.detach() - running_C).exp().clamp(1 / self.clip, self.clip)
        return torch.where(affine.updates >= self.clip_after, ratio_C, 1.0)

    def moments(self, means_KC: Tensor, count: Tensor) -> dict[str, Tensor]:
        """Return the second moment, as the variance about a mean of 0."""
        return {"running_var": means_KC[0]}
