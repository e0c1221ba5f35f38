"""Layers that compute with standardized weights: mean 0 and variance 1 over each output filter.

    w = (W - mean(W)) / sqrt(var(W) + eps)

``var`` is the biased variance over the filter's inputs, and eps = 1e-5 is under the root, as in batch norm. Qiao et
al., "Micro-Batch Training with Batch-Channel Normalization and Weight Standardization", 2019 (arXiv 1903.10520). Their
code divides by the unbiased deviation + 1e-5 instead, which differs by sqrt((n - 1) / n) for n weights per filter, and
is not finite for n = 1. Biased with eps under the root is the form of BiT (Kolesnikov et al., ECCV 2020, there with eps
1e-10) and of most models since. The next norm takes out a constant factor, so the forms train alike.

Gradients pass through mean and variance, and the parameter W is stored and stepped as it is. Nothing restores the scale
of W, so the function of a layer changes when it is converted, as published.
"""

from __future__ import annotations

from torch import Tensor, nn

from distnorm.layers.reweighted import (
    Reweighted,
    ReweightedConv,
    ReweightedConvTranspose1d,
    ReweightedConvTranspose2d,
    ReweightedConvTranspose3d,
    ReweightedLinear,
)
from distnorm.methods.base import compute_dtype

EPS = 1e-5


def standardized(weight: Tensor, dims: list[int]) -> Tensor:
    """Return ``weight`` with mean 0 and, but for eps, variance 1 over ``dims``; filters of one value all become 0."""
    wide = weight.to(compute_dtype(weight.dtype))
    apart = wide - wide.mean(dims, keepdim=True)
    variance = apart.square().mean(dims, keepdim=True)
    return (apart * (variance + EPS).rsqrt()).to(weight.dtype)


class Standardized(Reweighted):
    """A layer that computes with a standardized weight, in training and in evaluation."""

    def effective_weight(self, weight: Tensor) -> Tensor:
        """Return ``weight`` with each output filter standardized."""
        parts, dims = self.filters(weight)
        return standardized(parts, dims).reshape(weight.shape)


class StandardizedConv1d(Standardized, ReweightedConv, nn.Conv1d):
    """``nn.Conv1d`` with a standardized weight."""


class StandardizedConv2d(Standardized, ReweightedConv, nn.Conv2d):
    """``nn.Conv2d`` with a standardized weight."""


class StandardizedConv3d(Standardized, ReweightedConv, nn.Conv3d):
    """``nn.Conv3d`` with a standardized weight."""


class StandardizedLinear(Standardized, ReweightedLinear):
    """``nn.Linear`` with a standardized weight."""


class StandardizedConvTranspose1d(Standardized, ReweightedConvTranspose1d):
    """``nn.ConvTranspose1d`` with a standardized weight."""


class StandardizedConvTranspose2d(Standardized, ReweightedConvTranspose2d):
    """``nn.ConvTranspose2d`` with a standardized weight."""


class StandardizedConvTranspose3d(Standardized, ReweightedConvTranspose3d):
    """``nn.ConvTranspose3d`` with a standardized weight."""


TARGETS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: StandardizedConv1d,
    nn.Conv2d: StandardizedConv2d,
    nn.Conv3d: StandardizedConv3d,
    nn.ConvTranspose1d: StandardizedConvTranspose1d,
    nn.ConvTranspose2d: StandardizedConvTranspose2d,
    nn.ConvTranspose3d: StandardizedConvTranspose3d,
    nn.Linear: StandardizedLinear,
}
