"""Adaptive instance norm: a content takes mean and standard deviation per channel from a style."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distnorm.layers.tracing import is_traced, leaf
from distnorm.methods.base import compute_dtype
from distnorm.nn import checks
from distnorm.nn.norms import instance_norm


class AdaIN(nn.Module):
    """Adaptive instance norm: ``t = std(style) * (x - mean(x)) / std(x) + mean(style)``, per sample and channel.

    ``forward(input, style)``: input and output are ``[N, C, ...]``, style is ``[N, C, ...]`` of any spatial size; both
    have at least one spatial dimension. ``alpha`` blends: ``y = alpha * t + (1 - alpha) * x``. ``std`` is
    ``sqrt(var + eps)`` with the biased variance, on both sides, so an input that is its own style stays as it is.
    Gradients flow to both. There are no parameters. Issues no collective.

    Raises:
        TypeError: input or style is not floating point.
        ValueError: wrong shape, fewer than 2 values per sample and channel in the input, or none in the style.
    """

    def __init__(self, alpha: float = 1.0, eps: float = 1e-5) -> None:
        """Take the weight of the style, from 0 (the input as it is) to 1, and what is added to variances."""
        super().__init__()
        checks.check_arguments(self, alpha=alpha, eps=eps)
        self.alpha, self.eps = alpha, eps

    def forward(self, input: Tensor, style: Tensor) -> Tensor:
        """Return ``input`` with the statistics of ``style``."""
        if is_traced(input):
            node: Tensor = leaf(self, input, style)
            return node
        checks.check_features(self, input, None, checks.SPATIAL)
        checks.check_spatial(self, input)
        self._check_style(style, input)
        wide_NCL = style.to(compute_dtype(style.dtype)).flatten(2)
        mean_NC = wide_NCL.mean(2)
        var_NC = (wide_NCL - mean_NC[..., None]).square().mean(2)  # torch.var_mean warns if there are no samples
        styled = instance_norm(input, (var_NC + self.eps).sqrt(), mean_NC, self.eps)
        return styled if self.alpha == 1 else torch.lerp(input, styled, self.alpha)

    def _check_style(self, style: Tensor, input: Tensor) -> None:
        checks.check_features(self, style, None, checks.SPATIAL, what="style")
        alike = torch.jit.is_tracing() or (style.shape[:2] == input.shape[:2] and style.shape[2:].numel() > 0)
        if not alike:
            raise ValueError(
                f"{checks.name_of(self)}: the style has shape {tuple(style.shape)}; need [N, C, ...] = "
                f"[{input.shape[0]}, {input.shape[1]}, ...], as the input of shape {tuple(input.shape)}, with at least "
                "1 value per sample and channel."
            )

    def extra_repr(self) -> str:
        """Return both options."""
        return f"alpha={self.alpha}, eps={self.eps}"
