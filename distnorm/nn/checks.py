"""Checks of the arguments and inputs of layers, before anything is computed or sent."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn

from distnorm.compat.dispatch_state import are_plain
from distnorm.layers.module import DistNorm
from distnorm.validation import Rule, check, number, shown, whole

LARGEST = 2**31 - 1

CHANNELS = Annotated[int, whole("channels", 1, LARGEST)]
ODD = Rule(lambda value: type(value) is int and value > 0 and value % 2 == 1, "an odd whole number, at least 1")
SMALL = Rule(lambda value: isinstance(value, float) and 0 < value < 1, "a number above 0 and below 1, such as 1e-5")
ARGUMENTS = {
    "num_features": CHANNELS,
    "label_channels": CHANNELS,
    "hidden": CHANNELS,
    "num_classes": Annotated[int, whole("classes", 1, LARGEST)],
    "kernel_size": Annotated[int, ODD],
    "alpha": Annotated[float, number(0, 1)],
    "eps": Annotated[float, SMALL],
}
"""What constructors allow."""


def check_arguments(layer: nn.Module, **given: object) -> None:
    """Raise a ValueError unless ``ARGUMENTS`` allows what the constructor of ``layer`` was ``given``."""
    check(type(layer).__name__, ARGUMENTS, given)


def name_of(layer: nn.Module) -> str:
    """Return the name of the norm in ``layer`` where its model was converted; else how ``layer`` was built."""
    norm = layer._modules.get("norm")
    return norm._site.name if isinstance(norm, DistNorm) else f"{type(layer).__name__}({layer.extra_repr()})"


class Shape(NamedTuple):
    """How many dimensions an input may have, and how messages describe it."""

    words: str
    least: int
    most: int


ANY = Shape("[N, C, ...]", 2, LARGEST)
SPATIAL = Shape("[N, C, ...] with at least one spatial dimension", 3, LARGEST)
IMAGE = Shape("[N, C, H, W]", 4, 4)


def check_features(
    layer: nn.Module, x_NCL: Tensor, num_features: int | None, shape: Shape, what: str = "input"
) -> None:
    """Raise unless ``x_NCL`` is floating point and has the given shape and ``num_features`` channels.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong shape.
    """
    check_tensor(layer, x_NCL, what)
    if not x_NCL.is_floating_point():
        raise TypeError(f"{name_of(layer)}: the {what} has dtype {x_NCL.dtype}; need a floating-point one.")
    if not shape.least <= x_NCL.dim() <= shape.most:
        raise ValueError(f"{name_of(layer)}: the {what} has shape {tuple(x_NCL.shape)}; need {shape.words}.")
    if num_features is not None and not torch.jit.is_tracing() and x_NCL.shape[1] != num_features:
        raise ValueError(
            f"{name_of(layer)}: the {what} has {x_NCL.shape[1]} channels (shape {tuple(x_NCL.shape)}); need "
            f"{num_features}, in dimension 1."
        )


def check_tensor(layer: nn.Module, value: object, what: str) -> None:
    """Raise a TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name_of(layer)}: the {what} is {shown(value)}; need a tensor.")


def check_labels(layer: nn.Module, labels: Tensor, samples: int, classes: int, device: torch.device) -> None:
    """Raise unless ``labels`` are a class per sample, or a blend of classes.

    Values are compared on the CPU only: elsewhere the host would have to wait for them, and torch's lookup compares
    them on the device. docs/conditional.md#class-ids-on-a-gpu

    Raises:
        TypeError: class ids that are not whole numbers, or blend weights that are not floating point.
        ValueError: wrong shape or device, or a class id out of range.
    """
    check_tensor(layer, labels, "label")
    name, shape = name_of(layer), tuple(labels.shape)
    if not torch.jit.is_tracing() and shape not in ((samples,), (samples, classes)):
        raise ValueError(
            f"{name}: labels have shape {shape}; need class ids [N] = [{samples}], or blend weights "
            f"[N, num_classes] = [{samples}, {classes}]."
        )
    if labels.device != device:
        raise ValueError(
            f"{name}: labels are on {labels.device}, the layer's parameters on {device}. Move the labels there once "
            "per step: labels.to(device, non_blocking=True)."
        )
    if labels.dim() == 2:
        if not labels.is_floating_point():
            raise TypeError(f"{name}: blend weights [N, num_classes] have dtype {labels.dtype}; need floating point.")
        return
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name}: class ids [N] have dtype {labels.dtype}; need whole numbers, such as torch.int64.")
    if torch.compiler.is_compiling() or not (labels.is_cpu and are_plain(labels)):
        return
    wrong = sorted({each for each in labels.tolist() if not 0 <= each < classes})
    if wrong:
        raise ValueError(f"{name}: class id {wrong[0]} is out of range; need 0 to {classes - 1}.")


def check_spatial(layer: nn.Module, x_NCL: Tensor) -> None:
    """Raise if ``x_NCL`` has 1 value per sample and channel, which has no variance.

    Raises:
        ValueError: it has.
    """
    if not torch.jit.is_tracing() and x_NCL.shape[2:].numel() < 2:
        raise ValueError(
            f"{name_of(layer)}: the input has shape {tuple(x_NCL.shape)}; need at least 2 values per sample and "
            "channel."
        )
