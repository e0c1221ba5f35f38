"""A model of a library, what it is given, and what a training step of it shows."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

RATE = 0.001
TIMED_SIDE = int(os.environ.get("TIMED_SIDE", "128"))
"""Pixels of the pictures of a timed step, where the model takes any."""
Trace = dict[str, Tensor]
Given = Mapping[str, Any]
"""Arguments of the model by name; positional ones come first, under numbers."""
Inputs = Callable[[int], Given]
"""Draws arguments for so many samples from torch's generator."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model: built with random weights, without a download."""

    library: str
    family: str
    model: str
    build: Callable[[], nn.Module]
    inputs: Inputs
    batch: int = 4
    timed: Inputs | None = None
    """What a timed step is given, if it is more."""
    timed_batch: int = 4
    whole: str = ""
    """Why a batch cannot be split over ranks, where it cannot."""

    @property
    def key(self) -> str:
        return f"{self.library}/{self.family}"

    def make(self) -> nn.Module:
        """The model, the same one in every call, in training mode, in the default dtype."""
        seed(0)
        model = self.build().train()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                wear(module)
        return model

    def draw(self, number: int, batch: int | None = None) -> Given:
        """The arguments of step ``number``."""
        seed(1 + number)
        return self.inputs(batch or self.batch)


def seed(number: int) -> None:
    """Of everything that models draw from."""
    torch.manual_seed(number)
    random.seed(number)


def wear(norm: _BatchNorm) -> None:
    """Give ``norm`` a scale, a shift and running statistics as training leaves them: zeros and ones hide errors."""
    with torch.no_grad():
        for tensor, low in ((norm.weight, 0.5), (norm.bias, -0.5), (norm.running_mean, -0.5), (norm.running_var, 0.5)):
            if tensor is not None:
                tensor.copy_(torch.rand(tensor.shape, dtype=tensor.dtype) + low)


def steady(model: nn.Module) -> nn.Module:
    """``model`` without dropout: ranks, and compiled code, draw other numbers."""
    for module in model.modules():
        for name in (
            "p",
            "drop_prob",
            "drop_path",
            "drop_rate",
            "drop_connect_rate",
            "_drop_connect_rate",
            "dropout",
            "survival_prob",
        ):
            if isinstance(vars(module).get(name), float):
                setattr(module, name, 1.0 if name == "survival_prob" else 0.0)
    return model


def changed(given: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``given``, with ``change`` of every tensor in it."""
    if isinstance(given, Tensor):
        return change(given)
    if isinstance(given, Mapping):
        return {name: changed(value, change) for name, value in given.items()}
    return [changed(value, change) for value in given] if isinstance(given, list) else given


def scaled(given: Given, scale: float, dtype: torch.dtype) -> Given:
    """``given``, with real numbers multiplied by ``scale``, in ``dtype``."""
    found: Given = changed(given, lambda value: (value * scale).to(dtype) if value.is_floating_point() else value)
    return found


def call(model: nn.Module, given: Given) -> Any:
    """What ``model`` returns; it may change its inputs in place."""
    mine = changed(given, Tensor.clone)
    places = sorted(name for name in mine if name.isdigit())
    return model(*[mine.pop(name) for name in places], **mine)


def leaves(output: object, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of real numbers in ``output``, with their places."""
    if isinstance(output, Tensor):
        if output.is_complex():
            output = torch.view_as_real(output)
        if output.is_floating_point() and output.numel():
            yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from leaves(value, f"{name}.{key}")
    elif isinstance(output, list | tuple):
        for at, value in enumerate(output):
            yield from leaves(value, f"{name}.{at}")


def step(model: nn.Module, given: Given, *, rank: int = 0, ranks: int = 1) -> Trace:
    """One forward and backward pass; outputs and gradients. ``rank`` has its part of a batch of all ``ranks``."""
    seed(0)
    model.zero_grad()
    seen = dict(leaves(call(model, given)))
    losses = [(y * cotangent(y, rank, ranks)).sum() for y in seen.values() if y.requires_grad]
    torch.stack(losses).sum().backward()
    trace = {name: y.detach().clone() for name, y in seen.items()}
    grads = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return trace | {f"gradient of {name}": grad.clone() for name, grad in grads.items()}


def cotangent(y: Tensor, rank: int, ranks: int) -> Tensor:
    """This rank's part of the gradient of an output whose samples lie on all ranks."""
    count = y.numel()
    places = torch.arange(rank * count, (rank + 1) * count, dtype=y.dtype)
    return (places.mul(0.7).sin() / (count * ranks) ** 0.5).view_as(y)


def train(model: nn.Module, case: Case, steps: int = 3, *, scale: float = 1.0) -> Trace:
    """Steps of plain SGD; of each step what it shows, and the state at the end. Inputs are multiplied by ``scale``."""
    trace: Trace = {}
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for number in range(steps):
        given = scaled(case.draw(number), scale, torch.float64)
        trace |= {f"{name}, step {number}": value for name, value in step(model, given).items()}
        optimizer.step()
    return trace | state(model)


def state(model: nn.Module) -> Trace:
    """Parameters and buffers."""
    tensors = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    return {f"state {name}": value.clone() for name, value in tensors.items()}


def evaluate(model: nn.Module, given: Given) -> Trace:
    """Outputs in evaluation, after which the model trains again."""
    seed(0)
    model.eval()
    with torch.no_grad():
        seen = {name: y.clone() for name, y in leaves(call(model, given))}
    model.train()
    return seen


def difference(given: Trace, expected: Trace) -> float:
    """The largest difference, relative to the largest value of its tensor.

    Of a tensor that is zero but for rounding, as the gradient of a bias before a norm, relative to a thousandth of the
    largest value of all tensors of its kind. Infinite where something is missing or not finite.
    """
    if given.keys() != expected.keys():
        return float("inf")
    scales = {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in expected.items()}
    largest: dict[str, float] = {}
    for name, value in expected.items():
        if value.is_floating_point():
            largest[_kind(name)] = max(scales[name], largest.get(_kind(name), 0.0))
    worst = 0.0
    for name, value in expected.items():
        if value.shape != given[name].shape:
            return float("inf")
        scale = max(scales[name], 1e-3 * largest.get(_kind(name), 0.0), 1e-30)
        off = (given[name].double() - value.double()).abs().max() / scale if value.numel() else torch.tensor(0.0)
        worst = max(worst, float(off)) if off.isfinite() else float("inf")
    return worst


def _kind(name: str) -> str:
    return name.partition(" ")[0].partition(".")[0].rstrip(",")
