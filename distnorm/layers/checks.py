"""Checks of a layer's input, before anything is computed or sent."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.layers.site import Site
from distnorm.types import Running


def check_input(layer: _BatchNorm, site: Site, x_NCL: Tensor, state: Running) -> None:
    """Raise if ``layer`` cannot process ``x_NCL`` in training or evaluation; the message names the layer."""
    try:
        layer._check_input_dim(x_NCL)
    except ValueError as error:
        raise ValueError(f"{site.name}: {error}") from None
    if not x_NCL.is_floating_point():
        raise TypeError(f"{site.name}: given {x_NCL.dtype} values; normalization needs a floating-point input.")
    channels = x_NCL.shape[1]
    if not isinstance(channels, Tensor) and channels != layer.num_features:  # tensors while tracing
        raise ValueError(
            f"{site.name}: given {channels} channels (shape {tuple(x_NCL.shape)}); the layer "
            f"normalizes {layer.num_features}, in dimension 1."
        )
    used = layer.track_running_stats or not layer.training
    if used and (state.mean_C is None) != (state.var_C is None):
        missing, there = ("mean", "var") if state.mean_C is None else ("var", "mean")
        raise ValueError(
            f"{site.name}: running_{missing} is None and running_{there} is not. Set both to None for a "
            "layer that always uses the statistics of its batch, or neither."
        )


def check_inputs(site: Site, inputs: tuple[Tensor, ...]) -> None:
    """Raise a TypeError if ``inputs`` are not as many as the method names."""
    if len(inputs) != len(site.inputs):
        method, takes = site.conversion.recipe.method, ", ".join(("input", *site.inputs))
        raise TypeError(
            f"{site.name}: given {1 + len(inputs)} inputs; {method} takes {1 + len(site.inputs)} ({takes}). A residual "
            "is given by name, residual=...."
        )


def check_training(layer: _BatchNorm, site: Site, x_NCL: Tensor) -> None:
    """Raise if ``layer`` cannot train on ``x_NCL``; the message names the layer."""
    if layer.eps <= 0:
        raise ValueError(f"{site.name}: eps is {layer.eps}; training needs one above 0, such as 1e-5.")
    if type(x_NCL) is not Tensor and hasattr(x_NCL, "to_local"):
        raise TypeError(
            f"{site.name}: given a {type(x_NCL).__name__}; ranks share statistics by the recipe, so give the "
            "layer its local part, x.to_local()."
        )
    scaled = x_NCL.dtype == torch.float16 and torch.is_grad_enabled() and site.conversion.facts.keeps_cotangents
    if scaled and site.conversion.loss_scale is None:
        raise RuntimeError(
            f"{site.name}: float16 training with {site.conversion.recipe.policy}, which keeps cotangents over steps, "
            "must know the loss scale. Pass it: distnorm.attach(model, loss_scale=scaler.get_scale) with a "
            "GradScaler, or loss_scale=lambda: 1.0 if the loss is not scaled; bfloat16 needs none."
        )


def check_alone(site: Site, x_NCL: Tensor) -> None:
    """Raise if ``x_NCL`` has 1 value per channel, for a layer that shares nothing although its method would.

    Raises:
        ValueError: it has.
    """
    channels, method_shares = x_NCL.shape[1], site.measured is None or site.measured.parts
    if not isinstance(channels, Tensor) and method_shares and x_NCL.numel() == channels:  # tensors while tracing
        raise site.too_few(1)
