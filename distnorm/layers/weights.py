"""The weights of the convolutions and linear layers that precede converted norms.

``centralized``: W <- W - mean of W per output filter. It replaces the centring of activations, which RMS lacks. Yan et
al., ICLR 2020 (CenConv2d in their code). Training computes with the centred weight, and gradients pass through the
projection. After every optimizer step the parameter itself is centred, in place. So a state_dict holds the weights with
which training computed, also for stock models, and aliases of the parameter stay valid:
docs/decisions.md#centralized-weights-are-kept-in-the-parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from distnorm.layers import optimizer_hooks
from distnorm.layers.centralized import ORIGINALS, OURS, TARGETS, Centralized
from distnorm.layers.class_swap import swap, underlying
from distnorm.layers.conversion import Conversion


def centralize(
    module: nn.Module, norms: Iterable[nn.Module], conversion: Conversion, name: str, *, as_given: bool
) -> None:
    """Centralize the weight of ``module``, which precedes ``norms``, by class swap: state_dict keys do not change.

    ``as_given`` says that the running statistics were computed with the weight before centring. Evaluation then uses
    that weight, as in the stock model, until training continues.
    """
    swap(module, TARGETS[underlying(module)])
    # Through __dict__, so that norms do not become children of the module.
    module.__dict__.update(_norms=tuple(norms), _conversion=conversion, _name=name, as_given=as_given)
    optimizer_hooks.register(module)


def write_centred(model: nn.Module) -> None:
    """Write centred weights into the parameters."""
    for module in centralized(model):
        if module.is_pending():
            module.project()


def release(module: nn.Module) -> None:
    """Restore the original class of a layer with a centralized weight; the parameter does not change."""
    for name in OURS:
        module.__dict__.pop(name, None)
    swap(module, ORIGINALS[underlying(module)])
    optimizer_hooks.unregister(module)


def centralized(model: nn.Module) -> list[Any]:
    """Return the layers of ``model`` with centralized weights."""
    return [module for module in model.modules() if isinstance(module, Centralized)]


def project_with(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None] | None:
    """Omit the projection of gradients for the weights that ``optimizer`` steps, if it is SGD.

    Returns a function that undoes this, or None if the optimizer is not SGD.

    Projection P is linear, and so is SGD with momentum and weight decay: P (W - lr v) is the same for v from plain
    gradients and from projected ones. Only gradient clipping by norm differs: here it uses gradients before projection.
    """
    if type(optimizer) is not torch.optim.SGD:
        return None
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    layers = [module for module in centralized(model) if id(module._parameters.get("weight")) in stepped]
    for layer in layers:
        layer.projected = True

    def undo() -> None:
        for layer in layers:
            layer.projected = False

    return undo


def mark_trained(model: nn.Module) -> None:
    """Record that the weights of ``model`` were trained as centred ones, even if an optimizer steps flat copies."""
    for layer in centralized(model):
        layer.kept = layer.as_given = False
    exclude(model)


def exclude(model: nn.Module) -> None:
    """Stop centring the weights of layers whose outputs are known to go to other modules than norms too."""
    for layer in centralized(model):
        layer.left = layer._name in layer._conversion.feeders.left


def outputs_of(module: nn.Module) -> int:
    """Return the number of output channels or features of ``module``."""
    return int(getattr(module, "out_channels", 0) or getattr(module, "out_features", 0))


def weights_per_filter(module: nn.Module) -> int:
    """Return the number of weights per filter, not from the weight itself, which ``deepspeed.zero.Init`` empties."""
    if isinstance(module, nn.Linear):
        return module.in_features
    assert isinstance(module, _ConvNd)
    return module.in_channels // module.groups * math.prod(module.kernel_size)
