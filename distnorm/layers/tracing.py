"""Tracers meet converted layers: torch.fx records one node for each, as for torch's own, and torch.jit scripts them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.conv import _ConvNd


def is_traced(value: object) -> bool:
    """Whether ``value`` stands for one that a graph of torch.fx will hold."""
    return isinstance(value, Proxy)


# docs/decisions.md#converted-layers-are-leaf-modules
def leaf(module: nn.Module, proxy: Any) -> Any:
    """The node that calls ``module`` with ``proxy``.

    A tracer takes for leaves what ``torch.nn`` defines, and walks into all other modules.

    Raises:
        TypeError: ``module`` is not a part of the model that is traced, but all of it.
    """
    path = cast(Any, proxy.tracer).path_of_module(module)
    if not path:
        raise TypeError(
            f"torch.fx: {type(module).__name__} is one node of a graph; trace a model that has it, such as "
            "torch.nn.Sequential(layer)."
        )
    return proxy.tracer.create_proxy("call_module", path, (proxy,), {})


class ScriptedConv(_ConvNd):
    """A convolution that torch's script of it takes for torch's own. Mixed in before torch's class."""

    def forward(self, input: Tensor) -> Tensor:
        """As torch's convolution, or what the subclass makes of it."""
        if torch.jit.is_scripting():
            scripted: Tensor = self._conv_forward(input, self.weight, self.bias)
            return scripted
        else:
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        raise NotImplementedError
