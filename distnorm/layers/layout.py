"""What a method shares in each layer, found by running it once on two samples of zeros."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.autograd.share import divisor
from distnorm.compat.dispatch_state import modes_disabled
from distnorm.methods import ChannelAffine, Declared, Layer, Method, Shared
from distnorm.methods.base import identity
from distnorm.types import Direction, Layout, Link, Op

STOCK = ("running_mean", "running_var")


class Part(NamedTuple):
    """The shapes of one share: of its sums, of its weight (None for a number) and of its coordinates."""

    sums: torch.Size
    weight: torch.Size | None
    theta: torch.Size
    op: Op

    @property
    def forward(self) -> int:
        """Return the number of values of its statistics, without the count at their end."""
        return math.prod(self.sums) + self.weights

    @property
    def backward(self) -> int:
        """Return the number of values of its cotangents."""
        return math.prod(self.theta) + (0 if self.op == "max" else self.weights)

    @property
    def weights(self) -> int:
        """Return the number of weights that are shared as values."""
        return 0 if self.weight is None else math.prod(self.weight)

    def read(self, values: Tensor, over: Tensor | float, total: Tensor) -> Shared:
        """Return what ``values`` contain: means over ``total`` values, times ``over``."""
        if self.weight is None:
            return Shared((values / over).view(self.sums), total)
        first, weight = values.split([math.prod(self.sums), self.weights])
        first, weight = first.view(self.sums), weight.view(self.weight)
        if self.op == "max":
            return Shared(first, weight)
        return Shared(first / divisor(weight), weight / over * total)


class Measured(NamedTuple):
    """What a method shares in a layer, by name and in order, the core of its ``share.affine``, and what it declares."""

    parts: Mapping[str, Part]
    core: ChannelAffine | None
    declared: Declared

    def read(self, payloads: Mapping[str, Tensor]) -> dict[str, Shared]:
        """Return the shared statistics in ``payloads``, which end with their counts."""
        return {
            name: self.parts[name].read(payload[:-1], divisor(payload[-1]), payload[-1])
            for name, payload in payloads.items()
        }

    def targets(self, method: Method, shared: Mapping[str, Shared], layer: Layer) -> dict[str, Tensor]:
        """Return the targets of the core, if there is one, and those of ``method``."""
        of_core = {} if self.core is None or self.core is method else self.core.targets(shared, layer)
        return {**of_core, **method.targets(shared, layer)}


def layout_of(layers: Iterable[tuple[str, _BatchNorm]], method: Method) -> Layout:
    """Return the sizes of what ``method`` shares in each of ``layers``, and the device of their first tensor."""
    sizes: dict[tuple[str, Direction, str], int] = {}
    device: torch.device | None = None
    for layer_name, layer in layers:
        if device is None:
            device = next((each.device for each in (*layer.parameters(), *layer.buffers())), torch.device("cpu"))
        for name, part in measure(method, layer.num_features).parts.items():
            sizes[layer_name, "forward", name] = part.forward
            sizes[layer_name, "backward", name] = part.backward
    return Layout(sizes, device or torch.device("cpu"))


@lru_cache(maxsize=1024)
def measure(method: Method, features: int) -> Measured:
    """Return what ``method`` shares in a layer of so many ``features``.

    Raises:
        ValueError: it shares twice by one name, uses another name or ``op`` than it may, declares a buffer that a
            compiled graph could not update, or has targets for buffers that do not exist or have other shapes.
    """
    # Not on meta tensors: torch 2.13 imports Dynamo for the first of these, which takes seconds.
    with modes_disabled(), torch.no_grad(), torch.device("cpu"):
        declared = method.declare(features)
        _check_buffers(method, declared.buffers)
        one_C = torch.ones(features)
        parameters = {"weight": one_C, "bias": one_C, **declared.parameters}
        buffers = {"running_mean": torch.zeros(features), "running_var": one_C, **declared.buffers}
        layer = Layer(1e-5, parameters, buffers, torch.zeros((), dtype=torch.int64))
        x, probe = torch.zeros(2, features, 2, 2), _Probe(method)
        method.normalize(x, probe, layer, *method.examples(x))
        measured = Measured(probe.parts, probe.core, declared)
        _check_targets(method, measured.targets(method, probe.shared, layer), buffers)
    return measured


class _Probe:
    """A ``methods.Share`` that notes shapes."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.parts: dict[str, Part] = {}
        self.shared: dict[str, Shared] = {}
        self.core = method if isinstance(method, ChannelAffine) else None

    def __call__(
        self, sums: Tensor, weight: Tensor | float, link: Link = identity, *, name: str = "", op: Op = "sum"
    ) -> tuple[Tensor, Tensor]:
        if name in self.parts:
            raise ValueError(
                f"{self.method}: shares twice by the name {name!r} in one forward; give each its own name."
            )
        if op == "max" and not (self.method.needs_max and isinstance(weight, Tensor) and weight.shape == sums.shape):
            raise ValueError(
                f"{self.method}: shares {name!r} with op='max', which needs needs_max = True in its class, and as "
                f"weight the number of ties of each of the {list(sums.shape)} maxima."
            )
        total = weight.double() if isinstance(weight, Tensor) else torch.tensor(float(weight), dtype=torch.float64)
        means = sums.double() if op == "max" else sums.double() / divisor(total)
        theta = link(means)
        self.parts[name] = Part(sums.shape, weight.shape if isinstance(weight, Tensor) else None, theta.shape, op)
        self.shared[name] = Shared(means, total)
        return theta, total

    def affine(self, x_NCL: Tensor, core: ChannelAffine, layer: Layer) -> Tensor:
        self.core = core
        return core.normalize(x_NCL, self, layer)


def _check_buffers(method: Method, buffers: Mapping[str, Tensor]) -> None:
    # torch 2.13: graphs take a float64 tensor without dimensions on a CPU for a Python float, and lose its updates in
    # place (tests/test_graphs.py). ``model.double()`` makes one of any.
    scalars = [name for name, buffer in buffers.items() if not buffer.dim() and buffer.is_floating_point()]
    if scalars:
        raise ValueError(
            f"{method}: declares the buffer {scalars[0]!r} without dimensions, whose updates torch.compile loses in "
            "float64 on a CPU. Give it the shape [1]."
        )


def _check_targets(method: Method, targets: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        expected = buffers.get(name)
        if expected is None or expected.shape != target.shape or not expected.is_floating_point():
            given = {each: (list(buffer.shape), buffer.dtype) for each, buffer in buffers.items()}
            raise ValueError(
                f"{method}: has a target of shape {list(target.shape)} for buffer {name!r}; its layers have {given}, "
                "of which those with floating-point values have targets of the same shape."
            )
