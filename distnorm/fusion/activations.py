"""Which layers and functions of torch compute an activation that norms can compute, and which layers do nothing.

Only torch's own classes count, as they were when this module was imported, and only while nothing observes the layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any, TypeGuard

from torch import nn

from distnorm.compat.dispatch_state import has_global_hooks
from distnorm.kernels.activations import ACTIVATIONS
from distnorm.types import Activation

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_LAYERS: tuple[type[nn.Module], ...] = (*(row.layer for row in ACTIVATIONS.values()), nn.Identity, *_DROPOUTS)
_FORWARDS = {layer: layer.forward for layer in _LAYERS}


def is_unobserved(child: nn.Module) -> bool:
    """Return whether calling ``child`` runs the forward of its class and nothing else."""
    hooked = any(getattr(child, name) for name in _HOOKS) or has_global_hooks()
    return "forward" not in vars(child) and not hooked


def _is_torchs(child: object) -> TypeGuard[nn.Module]:
    if not isinstance(child, nn.Module) or type(child) not in _FORWARDS:
        return False
    return type(child).forward is _FORWARDS[type(child)] and is_unobserved(child)


def activation_of(child: object) -> Activation | None:
    """Return what ``child`` computes, if it is a layer of torch that computes an activation, and has no hooks."""
    if not _is_torchs(child):
        return None
    name = next((name for name, row in ACTIVATIONS.items() if row.layer is type(child)), "")
    if name == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(vars(child).get("approximate", ""), "")
    if not name:
        return None
    option = ACTIVATIONS[name].option
    parameter = getattr(child, option) if option else 0.0
    return Activation(name, parameter) if isinstance(parameter, int | float) else None


def is_identity(child: object) -> bool:
    """Return whether ``child`` returns its input: an ``nn.Identity``, or a dropout of nothing, without hooks."""
    return _is_torchs(child) and (type(child) is nn.Identity or (isinstance(child, _DROPOUTS) and child.p == 0))


def functions_at(path: tuple[str, ...], names: dict[str, Any]) -> Iterator[str]:
    """Yield the activations of the function that ``path`` refers to: a name in ``names``, and attributes of modules."""
    value = names.get(path[0]) if path else None
    for name in path[1:]:
        value = getattr(value, name, None) if isinstance(value, ModuleType) else None
    yield from (name for name, row in ACTIVATIONS.items() if any(value is each for each in row.functions))
