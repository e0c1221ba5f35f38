"""Norms of each sample by itself: layer, group and instance norm, by torch's own functions.

    y = (x - mean) / sqrt(var + eps) * weight + bias

Mean and biased variance are those of a set of values of one sample: all of them (LayerNorm), a group of neighbouring
channels (GroupNorm), or one channel (InstanceNorm). Nothing is shared, so every policy gives the same and issues no
collective. Evaluation computes the same, so these layers cannot be folded, and running statistics are not used.

weight and bias are the batch norm's, one value per channel. For ``[N, C]`` inputs LayerNorm is nn.LayerNorm(C); for
others it is GroupNorm with one group, since nn.LayerNorm would have one weight per element of a sample. Ba, Kiros &
Hinton, "Layer Normalization", 2016; Wu & He, "Group Normalization", ECCV 2018; Ulyanov, Vedaldi & Lempitsky, "Instance
Normalization: The Missing Ingredient for Fast Stylization", 2016.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from distnorm.methods.base import Layer, Method, Share, compute_dtype
from distnorm.validation import Groups, check_fields

USUAL_GROUPS = 32
"""The number of groups of Wu & He."""


class PerSample(Method):
    """GroupNorm with a number of groups that depends on the number of channels."""

    @property
    def follows(self) -> bool:
        """Return false: it depends on the sample only."""
        return False

    @abstractmethod
    def groups_of(self, features: int) -> int:
        """Return the number of groups for so many channels."""

    def normalize(self, x_NCL: Tensor, share: Share, layer: Layer, *inputs: Tensor) -> Tensor:
        """Normalize each sample. Nothing is shared."""
        return self.evaluate(x_NCL, layer)

    def evaluate(self, x_NCL: Tensor, layer: Layer, *inputs: Tensor) -> Tensor:
        """Normalize each sample, as in training."""
        dtype = compute_dtype(x_NCL.dtype)
        weight_C, bias_C = (
            None if each is None else each.to(dtype) for each in (layer.parameters["weight"], layer.parameters["bias"])
        )
        groups = self.groups_of(x_NCL.shape[1])
        # Not torch.nn.functional's, which refuses sets of one value.
        return torch.group_norm(x_NCL.to(dtype), groups, weight_C, bias_C, layer.eps).to(x_NCL.dtype)

    def stock(self, features: int, layer: Layer) -> nn.Module:
        """Return nn.GroupNorm with the layer's weight and bias, which optimizers may hold."""
        norm = nn.GroupNorm(self.groups_of(features), features, layer.eps)
        for name in ("weight", "bias"):
            values_C = layer.parameters[name]
            if values_C is not None and not isinstance(values_C, nn.Parameter):
                values_C = nn.Parameter(values_C.detach().clone())
            setattr(norm, name, values_C)
        return norm


@final
@dataclass(frozen=True, kw_only=True)
class LayerNorm(PerSample):
    """Normalize all values of a sample together."""

    def groups_of(self, features: int) -> int:
        """Return 1."""
        return 1


@final
@dataclass(frozen=True, kw_only=True)
class GroupNorm(PerSample):
    """Normalize groups of neighbouring channels of a sample.

    Args:
        groups: their number, which must divide the number of channels. None: 32, or in layers whose number of channels
            32 does not divide, the largest number below that does.
    """

    groups: Groups | None = None

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)

    def check(self, features: int) -> None:
        """Raise ValueError if the groups do not divide ``features`` channels."""
        if features % self.groups_of(features):
            raise ValueError(
                f"group_norm(groups={self.groups}) cannot divide {features} channels into groups of equal size. Use a "
                f"divisor of {features}, such as {_nearest(features, self.groups_of(features))}, or leave groups out: "
                "each layer then takes 32, or the largest divisor below."
            )

    def groups_of(self, features: int) -> int:
        """Return the number given, or the largest divisor of ``features`` up to 32."""
        return _nearest(features, USUAL_GROUPS) if self.groups is None else self.groups


@final
@dataclass(frozen=True, kw_only=True)
class InstanceNorm(PerSample):
    """Normalize each channel of a sample. A channel of one value becomes 0, as in inputs of two dimensions."""

    def groups_of(self, features: int) -> int:
        """Return the number of channels."""
        return features


def _nearest(features: int, most: int) -> int:
    return next(groups for groups in range(min(most, features), 0, -1) if features % groups == 0)
