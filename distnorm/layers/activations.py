"""What layers compute: an activation that norms can compute, nothing at all, or something without side effects.

Layers of torch are known, and those of others whose code is one call (``one_function.py``). Classes count as they were
when they were first seen, and only while nothing observes the layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from distnorm.compat.dispatch_state import is_unobserved
from distnorm.kernels.activations import ACTIVATIONS, named
from distnorm.layers.one_function import applied_by, may_be_read
from distnorm.types import Activation

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_SEQUENTIAL, _IN_ORDER = nn.Sequential.forward, nn.Sequential.__iter__
_ACTIVATIONS: dict[type[nn.Module], str] = {row.layer: name for name, row in reversed(ACTIVATIONS.items())}
_WITHOUT_EFFECTS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Flatten, nn.Upsample, nn.PixelShuffle, nn.ZeroPad2d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
)
"""Layers that draw no random numbers, communicate nothing and change nothing."""
_LAYERS: tuple[type[nn.Module], ...] = (*_ACTIVATIONS, *_DROPOUTS, *_WITHOUT_EFFECTS, nn.Identity)
_FORWARDS = {each: each.forward for each in _LAYERS}
_DROP_PATHS = {
    "timm.layers.drop.DropPath": "drop_prob",
    "timm.models.layers.drop.DropPath": "drop_prob",
    "torchvision.ops.stochastic_depth.StochasticDepth": "p",
}
"""Layers of other packages that return their input where this attribute is 0."""
_IDENTITY_IF: dict[type, Callable[[Any], bool]] = {}
"""By class, what to ask of its layers in order to know whether they return their input."""


def _is_torchs(child: nn.Module) -> bool:
    cls = type(child)
    return cls in _FORWARDS and cls.forward is _FORWARDS[cls] and is_unobserved(child)


def activation_name(child: Any) -> str | None:
    """Return the name of what ``child`` computes, if it is a layer that computes an activation, and has no hooks."""
    cls = type(child)
    name = _ACTIVATIONS.get(cls)
    if name is None:
        name = applied_by(child) if isinstance(child, nn.Module) else None
        return name if name and is_unobserved(child) else None
    if name == "gelu":
        name = {"none": "gelu", "tanh": "gelu_tanh"}.get(vars(child).get("approximate", ""))
    return name if cls.forward is _FORWARDS[cls] and is_unobserved(child) else None


def activation_of(child: object) -> Activation | None:
    """Return the activation of ``activation_name`` with its parameter, if that is a number."""
    name = activation_name(child)
    if name is None or not ACTIVATIONS[name].option:
        return None if name is None else named(name)
    parameter = getattr(child, ACTIVATIONS[name].option)
    return named(name, parameter) if isinstance(parameter, int | float) else None


def is_identity(child: object) -> bool:
    """Return whether ``child`` returns its input: an ``nn.Identity``, a dropout of nothing, or a sequence of these."""
    cls = type(child)
    if cls not in _IDENTITY_IF:
        _IDENTITY_IF[cls] = _identity_if(cls)
    return _IDENTITY_IF[cls](child)


def _identity_if(cls: Any) -> Callable[[Any], bool]:
    """Return what to ask of layers of the class ``cls``, as it is now."""
    if not issubclass(cls, nn.Module):
        return _never
    if cls is nn.Identity:
        return _is_torchs
    if cls in _DROPOUTS:
        return lambda child: bool(child.p == 0) and _is_torchs(child)
    if cls is nn.Sequential:
        return lambda child: all(map(is_identity, child._modules.values())) and _runs_its_children(child)
    forward, probability = cls.forward, _DROP_PATHS.get(f"{cls.__module__}.{cls.__qualname__}")
    if probability is not None:
        return lambda child: getattr(child, probability) == 0 and cls.forward is forward and is_unobserved(child)
    if may_be_read(cls):
        return lambda child: applied_by(child) == "" and is_unobserved(child)
    return _never


def _never(child: object) -> bool:
    return False


def is_sequence(cls: Any) -> bool:
    """Return whether modules of the class ``cls`` run their children one after another, as ``nn.Sequential``."""
    return cls.forward is _SEQUENTIAL and cls.__iter__ is _IN_ORDER


def _runs_its_children(child: nn.Module) -> bool:
    return is_sequence(type(child)) and is_unobserved(child)


def has_no_effects(child: object) -> bool:
    """Return whether calling ``child`` earlier or later changes nothing: a layer of torch, or a sequence of these."""
    if not isinstance(child, nn.Module):
        return False
    if type(child) is nn.Sequential:
        return _runs_its_children(child) and all(map(has_no_effects, child._modules.values()))
    return is_identity(child) or (type(child) in _WITHOUT_EFFECTS and _is_torchs(child))
