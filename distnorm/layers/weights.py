"""What recipes do with the weights of the convolutions and linear layers that precede converted norms.

``"centralized"`` (distnorm/layers/centralized.py), ``"standardized"`` (standardized.py), ``"normalized"``
(normalized.py).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from distnorm.layers import centralized as centralization
from distnorm.layers import normalized, standardized
from distnorm.layers.centralized import Centralized
from distnorm.layers.class_swap import swap, underlying
from distnorm.layers.conversion import Conversion
from distnorm.layers.normalized import Normalized
from distnorm.layers.reweighted import Reweighted

FORMS: dict[str, dict[type[nn.Module], type[nn.Module]]] = {
    "centralized": centralization.TARGETS,
    "standardized": standardized.TARGETS,
    "normalized": normalized.TARGETS,
}
"""By ``Recipe.weights``, the class to which a layer's class is swapped."""

ORIGINALS = {target: original for targets in FORMS.values() for original, target in targets.items()}
_OURS = ("projected", "kept", "as_given", "left", "_norms", "_conversion", "_name")


def reweight(
    module: nn.Module, norms: Iterable[nn.Module], conversion: Conversion, name: str, *, trained: bool
) -> None:
    """Let ``module``, which precedes ``norms``, compute with the weight that the recipe says, by class swap.

    ``trained`` says that the running statistics were computed with the weight as it is. Evaluation with a centralized
    weight then uses it as it is, as in the stock model, until training continues.
    """
    swap(module, FORMS[conversion.recipe.weights][underlying(module)])
    # Through __dict__, so that norms do not become children of the module.
    module.__dict__.update(_norms=tuple(norms), _conversion=conversion, _name=name)
    assert isinstance(module, Reweighted)
    module.start(trained=trained)


def bake(model: nn.Module) -> None:
    """Write the weights with which layers compute into their parameters, and restore the layers' classes.

    Parameters are written in place, so aliases stay valid. The gains of normalized weights are removed. Evaluation
    output does not change. Issues no collective, unless parameters are sharded.

    Raises:
        RuntimeError: a parameter cannot be written, since an engine has partitioned it, or its layer computes it from
            others; or a gain cannot be removed, since an engine has sharded it. The message names the layer. The model
            is unchanged.
    """
    _reshard(model)
    layers = reweighted(model)
    for layer in layers:
        layer.check_bake()
    for layer in layers:
        layer.bake()
        release(layer)


def _reshard(model: nn.Module) -> None:
    """Let FSDP2 drop the gathered copies of parameters that it keeps after a forward pass: writes to them are lost."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # its import takes a second
    for module in model.modules():
        if fsdp is not None and isinstance(module, fsdp.FSDPModule):
            module.reshard()


def write_centred(model: nn.Module) -> None:
    """Write centred weights into the parameters."""
    for layer in centralized(model):
        layer.bake()


def release(module: nn.Module) -> None:
    """Restore the original class of a layer with a computed weight; the parameter ``weight`` does not change."""
    assert isinstance(module, Reweighted)
    module.stop()
    for name in _OURS:
        module.__dict__.pop(name, None)
    swap(module, ORIGINALS[underlying(module)])


def reweighted(model: nn.Module) -> list[Any]:
    """Return the layers of ``model`` whose weights a recipe computes."""
    return [module for module in model.modules() if isinstance(module, Reweighted)]


def centralized(model: nn.Module) -> list[Any]:
    """Return the layers of ``model`` with centralized weights."""
    return [module for module in model.modules() if isinstance(module, Centralized)]


def added_parameters(model: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Yield the parameters that conversion added for weights, each after the parameter that its layer had before."""
    for module in model.modules():
        if isinstance(module, Normalized):
            weight = module._parameters.get("weight")
            if weight is not None:
                yield weight, module.gain


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
