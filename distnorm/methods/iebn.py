"""IEBN: batch norm whose scale each sample weakens or strengthens, by a gate on the mean of its channel.

    gate_nc = sigmoid(gate_weight_c * mean_hw(x_nc) + gate_bias_c)
    y = (x - mean) / sqrt(var + eps) * weight * gate + bias

The gate sees x before it is normalized. It starts with gate_weight 0 and gate_bias -1, so that the first outputs have a
scale of 0.27. It is computed per sample: what is shared is batch norm's, two sums per channel forward, two cotangents
backward. In evaluation the gate still depends on the sample, so the layer cannot be folded.

Liang, Huang, Liang & Yang, "Instance Enhancement Batch Normalization: An Adaptive Regulator of Batch Noise", AAAI 2020;
the initial values are those of the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from distnorm.methods.base import Declared, Layer, Method, Share, compute_dtype, per_channel
from distnorm.methods.batch_norm import BatchNorm

_CORE = BatchNorm()


@final
@dataclass(frozen=True, kw_only=True)
class IEBN(Method):
    """Batch norm with a gate per sample and channel, whose ``gate_weight`` and ``gate_bias`` ``[C]`` are trained."""

    @property
    def follows(self) -> bool:
        """Return false: it depends on the batch only."""
        return False

    def declare(self, features: int) -> Declared:
        """Declare the gate's parameters."""
        return Declared(parameters={"gate_weight": torch.zeros(features), "gate_bias": torch.full((features,), -1.0)})

    def normalize(self, x_NCL: Tensor, share: Share, layer: Layer, *inputs: Tensor) -> Tensor:
        """Normalize as batch norm without weight and bias, then apply the gate with both.

        The running statistics are batch norm's.
        """
        return _gated(x_NCL, share.affine(x_NCL, _CORE, _without_affine(layer)), layer)

    def evaluate(self, x_NCL: Tensor, layer: Layer, *inputs: Tensor) -> Tensor:
        """Normalize by the running statistics, then apply the gate of this sample."""
        return _gated(x_NCL, _CORE.evaluate(x_NCL, _without_affine(layer)), layer)


def _without_affine(layer: Layer) -> Layer:
    return layer._replace(parameters={"weight": None, "bias": None})


def _gated(x_NCL: Tensor, normalized_NCL: Tensor, layer: Layer) -> Tensor:
    weight_C, bias_C = layer.parameters["weight"], layer.parameters["bias"]
    dtype = compute_dtype(x_NCL.dtype)
    space = list(range(2, x_NCL.dim()))
    pooled_NCL = x_NCL.to(dtype).mean(space, keepdim=True) if space else x_NCL.to(dtype)
    gate_weight_C, gate_bias_C = layer.declared("gate_weight"), layer.declared("gate_bias")
    gate_NCL = (pooled_NCL * per_channel(gate_weight_C, x_NCL) + per_channel(gate_bias_C, x_NCL)).sigmoid()
    scale_NCL = gate_NCL if weight_C is None else gate_NCL * per_channel(weight_C, x_NCL)
    y_NCL = normalized_NCL.to(dtype) * scale_NCL
    return (y_NCL if bias_C is None else y_NCL + per_channel(bias_C, x_NCL)).to(x_NCL.dtype)
