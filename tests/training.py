"""Train a model for a few steps and note everything that can be seen of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import distnorm
from distnorm.recipe import Recipe

Trace = dict[str, Tensor]


def batches(
    shape: Sequence[int], steps: int = 3, *, dtype: torch.dtype = torch.float32, mean: float = 0.5
) -> list[Tensor]:
    """Inputs for ``steps`` steps, the same ones in every call."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator).add(mean).to(dtype) for _ in range(steps)]


_TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-4}}


def step(model: nn.Module, values: Tensor, *, lr: float = 0.1) -> Trace:
    """One forward, backward and update; outputs, gradients and buffers by name."""
    x = values.clone().requires_grad_()
    y = model(x)
    weights = torch.linspace(-1, 2, y.numel()).sin().view_as(y).to(y.dtype)
    model.zero_grad()
    (y * weights).sum().backward()
    seen = {"y": y.detach(), "dx": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            seen[f"d {name}"] = parameter.grad.clone()
            parameter.data -= lr * parameter.grad
    return seen | {name: buffer.clone() for name, buffer in model.named_buffers()}


def train(model: nn.Module, inputs: Sequence[Tensor]) -> Trace:
    """Every step's trace, and the output in evaluation."""
    seen = {f"step {at}: {name}": value for at, x in enumerate(inputs) for name, value in step(model, x).items()}
    was_training = model.training
    model.eval()
    seen["evaluation"] = model(inputs[0]).detach()
    model.train(was_training)
    return seen


def same(given: Trace, expected: Trace, *, exactly: bool = False) -> None:
    """Assert that both traces have the same names and values, to the rounding of their dtype unless ``exactly``.

    Of several steps: processors round otherwise, and the last step has what earlier ones have amplified.
    """
    assert given.keys() == expected.keys()
    for name, value in expected.items():
        tolerance = {"rtol": 0, "atol": 0} if exactly else _TOLERANCE.get(value.dtype, {})
        torch.testing.assert_close(given[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def converted(model: nn.Module, recipe: Recipe | str = "sync_bn", **options: object) -> nn.Module:
    """A converted copy of ``model``."""
    return distnorm.convert(copy.deepcopy(model), recipe, **options)


def made(
    kind: type[nn.modules.batchnorm._BatchNorm], channels: int, *, bias: bool = True, **options: object
) -> nn.modules.batchnorm._BatchNorm:
    """A ``worn`` layer; without ``bias`` also by a torch that knows no such option, as 2.11."""
    layer = kind(channels, **options)
    if not bias:
        layer.register_parameter("bias", None)
    return worn(layer)


def worn(layer: nn.modules.batchnorm._BatchNorm) -> nn.modules.batchnorm._BatchNorm:
    """``layer`` with a scale, a shift and running statistics as training leaves them."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            if tensor is not None:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return layer
