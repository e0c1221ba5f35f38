"""What the layers with an affine part as input are made of: a parameter-free norm, and an affine map per sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from distnorm import recipes
from distnorm.convert import convert
from distnorm.layers.module import DistNorm
from distnorm.methods.base import compute_dtype
from distnorm.recipe import Recipe


def shared_norm(norm: nn.BatchNorm2d, recipe: Recipe | str | None, name: str) -> nn.BatchNorm2d:
    """Convert ``norm`` to ``recipe`` under ``name``, for as long as no model that holds it is converted.

    Raises:
        ValueError: as ``recipes.parse`` and ``convert``.
    """
    if recipe is not None:
        convert(nn.ModuleDict({name: norm}), recipes.parse(recipe) if isinstance(recipe, str) else recipe)
        assert isinstance(norm, DistNorm)
        norm._site.conversion.is_provisional = True
    return norm


def affine_per_sample(y_NCL: Tensor, scale_NC: Tensor, shift_NC: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``y * scale + shift`` in ``dtype``, computed in float32 or wider."""
    wide, shape = compute_dtype(dtype), (*scale_NC.shape, *(1,) * (y_NCL.dim() - 2))
    return torch.addcmul(shift_NC.to(wide).view(shape), y_NCL, scale_NC.to(wide).view(shape)).to(dtype)


def instance_norm(x_NCL: Tensor, scale_NC: Tensor, shift_NC: Tensor, eps: float) -> Tensor:
    """Normalize by mean and biased variance per sample and channel, then scale and shift by values per sample.

    Every pair of sample and channel is a channel of one batch norm, whose kernels apply the affine map as well.
    """
    samples, channels, *spatial = x_NCL.shape
    if not torch.jit.is_tracing() and samples == 0:  # batch norm needs a channel
        return affine_per_sample(x_NCL, scale_NC, shift_NC, x_NCL.dtype)
    wide = compute_dtype(x_NCL.dtype)
    scale_M, shift_M = scale_NC.to(wide).reshape(-1), shift_NC.to(wide).reshape(-1)
    x_1ML = x_NCL.reshape(1, samples * channels, *spatial)
    return F.batch_norm(x_1ML, None, None, scale_M, shift_M, True, 0.0, eps).view(x_NCL.shape)
