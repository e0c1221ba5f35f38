"""The weights axis: what happens to the convolutions and linear layers that feed a converted layer.

``centralized``: W <- W - mean of W per output filter. It stands in for the centring that RMS lacks. Yan et al., ICLR
2020 (CenConv2d in their code). Training computes with the centred weight, and gradients pass through the projection;
after every step of an optimizer the parameter itself is centred, in place. So what a state_dict holds is what training
computed with, for stock models too, and every alias of the parameter stays valid:
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
    """Give ``module``, which feeds ``norms``, a centred weight, by class swap: parameters and state_dict keys stay.

    ``as_given`` says that running statistics belong to the weight as it is; evaluation then gives what the stock model
    gave until training goes on.
    """
    swap(module, TARGETS[underlying(module)])
    # Not attributes set the usual way: norms must not become children of what feeds them.
    module.__dict__.update(_norms=tuple(norms), _conversion=conversion, _name=name, as_given=as_given)
    optimizer_hooks.note(module)


def bake(model: nn.Module) -> None:
    """Write centred weights into the parameters."""
    for module in centralized(model):
        if module.is_behind():
            module.project()


def release(module: nn.Module) -> None:
    """Give a layer with a centred weight its original class back; the parameter stays as it is."""
    for name in OURS:
        module.__dict__.pop(name, None)
    swap(module, ORIGINALS[underlying(module)])
    optimizer_hooks.forget(module)


def centralized(model: nn.Module) -> list[Any]:
    """The layers of ``model`` with centred weights."""
    return [module for module in model.modules() if isinstance(module, Centralized)]


def project_with(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None] | None:
    """Leave out the projection of gradients for the weights that ``optimizer`` steps, if it is SGD; None if it is not.

    Projection P is linear, and so is SGD with momentum and weight decay: P (W - lr v) with v from plain gradients is
    what v from projected ones gives. Returns what undoes it.

    Clipping gradients by their norm sees the gradient before projection in this form, after it in the other.
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


def goes_on(model: nn.Module) -> None:
    """Say that the weights of ``model`` come from training with centred ones, whatever an engine puts into them."""
    for layer in centralized(model):
        layer.kept = layer.as_given = False
    leave(model)


def leave(model: nn.Module) -> None:
    """Leave alone what is known to feed other things than norms."""
    for layer in centralized(model):
        layer.left = layer._name in layer._conversion.feeders.left


def outputs_of(module: nn.Module) -> int:
    """Channels or features that ``module`` returns."""
    return int(getattr(module, "out_channels", 0) or getattr(module, "out_features", 0))


def weights_per_filter(module: nn.Module) -> int:
    """Of a convolution or linear layer; not from the weight, where ``deepspeed.zero.Init`` leaves an empty one."""
    if isinstance(module, nn.Linear):
        return module.in_features
    assert isinstance(module, _ConvNd)
    return module.in_channels // module.groups * math.prod(module.kernel_size)
