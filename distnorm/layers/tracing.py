"""Converted layers under tracers: torch.fx records one node for each, as for torch's layers; torch.jit scripts them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.conv import _ConvNd

ADDS = "_adds_to_norm"
"""The attribute of layers whose class does more in ``forward`` than the converted layer behind it."""


def is_traced(value: object) -> bool:
    """Return whether ``value`` is a proxy of torch.fx."""
    return isinstance(value, Proxy)


# docs/decisions.md#converted-layers-are-leaf-modules
def leaf(module: nn.Module, proxy: Any, rest: Any = ()) -> Any:
    """Return a graph node that calls ``module`` with ``proxy`` and the ``rest`` of its arguments.

    A tracer makes such nodes only for modules that ``torch.nn`` defines, and traces into all others.

    Raises:
        TypeError: ``module`` is the traced model itself, or only a part of what a layer does.
    """
    if getattr(module, ADDS, False):
        raise TypeError(
            f"torch.fx: {type(module).__name__} does more than normalize, so name it a leaf for the tracer: "
            "is_leaf_module of torch.fx.Tracer, or leaf_modules of tools built on it."
        )
    path = cast(Any, proxy.tracer).path_of_module(module)
    if not path:
        raise TypeError(
            f"torch.fx: {type(module).__name__} becomes one node of a graph, so it cannot be traced by itself; trace a "
            "model that has it, such as torch.nn.Sequential(layer)."
        )
    return proxy.tracer.create_proxy("call_module", path, (proxy, *rest), {})


class ScriptedConv(_ConvNd):
    """A convolution that torch.jit scripts as torch's own. A mixin that precedes torch's class."""

    def forward(self, input: Tensor) -> Tensor:
        """Run the subclass's ``_forward``, or torch's convolution when scripted."""
        if torch.jit.is_scripting():
            scripted: Tensor = self._conv_forward(input, self.weight, self.bias)
            return scripted
        else:
            if not isinstance(self, ScriptedConv):  # reverted, and called by what has wrapped the forward before
                return type(self).forward(self, input)
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        raise NotImplementedError
