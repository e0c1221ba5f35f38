"""The activations that may follow a norm, by name: torch's functions and layers, and their numbers in the kernels.

``gpu/activations.py`` has the formulas by which kernels compute them in float32. ATen's path and the plain path call
torch's function and differentiate it by autograd. To add one: a formula there, a row here, and a line in
``layers/scripting.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from distnorm.types import RELU, Activation


class Row(NamedTuple):
    """One activation of torch.

    Fields:
        compute: its function, of the input and the parameter.
        layer: its layer.
        functions: further functions that compute it, of the input first.
        option: the name of the parameter, as keyword of ``functions`` and as attribute of ``layer``; "" if none.
        default: its value by default.
        methods: names of methods of tensors that compute it.
    """

    compute: Callable[[Tensor, float], Tensor]
    layer: type[nn.Module]
    functions: tuple[Callable[..., Tensor], ...]
    option: str = ""
    default: float = 0.0
    methods: tuple[str, ...] = ()


ACTIVATIONS = {
    "relu": Row(
        lambda z, _: torch.relu(z),
        nn.ReLU,
        (functional.relu, functional.relu_, torch.relu, torch.relu_),
        methods=("relu", "relu_"),
    ),
    "relu6": Row(lambda z, _: functional.relu6(z), nn.ReLU6, (functional.relu6,)),
    "leaky_relu": Row(
        functional.leaky_relu,
        nn.LeakyReLU,
        (functional.leaky_relu, functional.leaky_relu_),
        option="negative_slope",
        default=0.01,
    ),
    "elu": Row(functional.elu, nn.ELU, (functional.elu, functional.elu_), option="alpha", default=1.0),
    "sigmoid": Row(
        lambda z, _: torch.sigmoid(z),
        nn.Sigmoid,
        (functional.sigmoid, torch.sigmoid, torch.sigmoid_),
        methods=("sigmoid", "sigmoid_"),
    ),
    "silu": Row(lambda z, _: functional.silu(z), nn.SiLU, (functional.silu,)),
    "mish": Row(lambda z, _: functional.mish(z), nn.Mish, (functional.mish,)),
    "gelu": Row(lambda z, _: functional.gelu(z), nn.GELU, (functional.gelu,)),
    "gelu_tanh": Row(lambda z, _: functional.gelu(z, approximate="tanh"), nn.GELU, (functional.gelu,)),
    "hardsigmoid": Row(lambda z, _: functional.hardsigmoid(z), nn.Hardsigmoid, (functional.hardsigmoid,)),
    "hardswish": Row(lambda z, _: functional.hardswish(z), nn.Hardswish, (functional.hardswish,)),
}

NONE, RECTIFIED = 0, 1
"""Numbers in the kernels: of no activation, and of the first, for which kernels have code of their own."""

NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS, RECTIFIED)}
"""The numbers of all; formulas are in this order."""

_CONSTANTS = {name: Activation(name) for name, row in ACTIVATIONS.items() if not row.option} | {RELU.name: RELU}
"""Those without a parameter."""


def named(name: str, parameter: float = 0.0) -> Activation:
    """Return the activation of this name.

    Raises:
        ValueError: there is none.
    """
    constant = _CONSTANTS.get(name)
    if constant is not None:
        return constant
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r}: allowed are {', '.join(ACTIVATIONS)}.")
    return Activation(name, parameter)


def as_numbers(activation: Activation | None) -> tuple[int, float]:
    """Return the number of ``activation`` in the kernels, and its parameter."""
    return (NONE, 0.0) if activation is None else (NUMBERS[activation.name], activation.parameter)


def activate(z_NCL: Tensor, activation: Activation | None) -> Tensor:
    """Return torch's value of ``activation`` in new memory; the input itself if there is none."""
    return z_NCL if activation is None else ACTIVATIONS[activation.name].compute(z_NCL, activation.parameter)


def pull(z_NCL: Tensor, dy_NCL: Tensor, activation: Activation) -> Tensor:
    """Return the gradient for ``z_NCL``, given that of its activation, by torch's own formula."""
    leaf_NCL = z_NCL.detach().requires_grad_()
    with torch.enable_grad():
        y_NCL = activate(leaf_NCL, activation)
    return torch.autograd.grad(y_NCL, leaf_NCL, dy_NCL)[0]
