"""What converted layers become without distnorm: stock batch norm, or another module of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.layers.module import DistNorm
from distnorm.layers.running_statistics import running_of, seen
from distnorm.methods import ChannelAffine, Layer
from distnorm.methods.base import batch_norm_folded

ModelT = TypeVar("ModelT", bound=nn.Module)
Outcome = nn.Module | tuple[Tensor, Tensor] | None
"""The module in a layer's place; or scale and shift of its evaluation, where its own parameters differ; or nothing."""


def check(layer: DistNorm) -> None:
    """Raise a RuntimeError if no module of torch computes what ``layer`` does."""
    method, view = layer.recipe.method, _view(layer)
    if isinstance(method, ChannelAffine) or method.folded(view) is not None:
        return
    if method.stock(layer.num_features, view) is None or type(layer).forward is not DistNorm.forward:
        raise RuntimeError(
            f"{layer._site.name}: no module of torch computes what {method} does, so this layer cannot be reverted. "
            "Evaluation works as it is, and torch.export takes the model in eval(); distnorm.fold(model) simplifies "
            "the layers of other methods."
        )


@torch.no_grad()
def outcome(layer: DistNorm) -> Outcome:
    """Return what ``layer`` is to become; None if its original class evaluates its parameters and buffers alike."""
    method, view = layer.recipe.method, _view(layer)
    if isinstance(method, ChannelAffine):
        return None
    folded = method.folded(view)
    if folded is None:
        return method.stock(layer.num_features, view)
    stock = batch_norm_folded(view)
    alike = stock is not None and all(torch.equal(*pair) for pair in zip(stock, folded, strict=True))
    return None if alike else folded


@torch.no_grad()
def finish(model: ModelT, outcomes: Sequence[tuple[_BatchNorm, Outcome]]) -> ModelT:
    """Give layers, of their original class by now, their ``outcomes``. Return the model, or what replaces it."""
    for layer, found in outcomes:
        if isinstance(found, tuple):
            _write(layer, *found)
    modules = {id(layer): found.train(layer.training) for layer, found in outcomes if isinstance(found, nn.Module)}
    for module in list(model.modules()):
        for name, child in module._modules.items():
            module._modules[name] = modules.get(id(child), child)
    return modules.get(id(model), model)  # type: ignore[return-value]  # a layer by itself becomes another class


def _write(layer: _BatchNorm, scale_C: Tensor, shift_C: Tensor) -> None:
    """Write parameters with which ``layer`` evaluates to ``scale_C * x + shift_C``."""
    parameter = next(layer.parameters(), None)
    dtype = torch.get_default_dtype() if parameter is None else parameter.dtype
    if layer.running_mean is None or layer.running_var is None:
        layer.register_buffer("running_mean", torch.zeros_like(shift_C, dtype=dtype))
        layer.register_buffer("running_var", torch.ones_like(scale_C, dtype=dtype))
        layer.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long, device=scale_C.device))
        layer.track_running_stats = True
    assert layer.running_mean is not None and layer.running_var is not None
    weight_C = scale_C * (layer.running_var.double() + layer.eps).sqrt()
    bias_C = shift_C + layer.running_mean.double() * scale_C
    for name, values_C in (("weight", weight_C), ("bias", bias_C)):
        if getattr(layer, name) is None:
            layer.register_parameter(name, nn.Parameter(values_C.to(dtype)))
        else:
            getattr(layer, name).copy_(values_C)
    layer.affine = True


def _view(layer: DistNorm) -> Layer:
    return seen(layer, running_of(layer))
