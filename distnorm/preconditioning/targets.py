"""Which layers are preconditioned: convolutions and linear layers with a bias, which the given optimizer steps."""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import UninitializedParameter

from distnorm.layers.centralized import Centralized
from distnorm.selection import Where, matches

Holders = dict[int, list[nn.Module]]


class Target(NamedTuple):
    """A weight and its bias; ``modules`` are the layers that hold both: one, or several that share them."""

    name: str
    modules: list[nn.Module]

    @property
    def parameters(self) -> tuple[Tensor, Tensor]:
        """Return the weight ``[out, in / groups, *kernel]`` and the bias ``[out]``."""
        held = self.modules[0]._parameters
        weight, bias = held["weight"], held["bias"]
        assert weight is not None and bias is not None, "layers without them are not selected"
        return weight, bias

    @property
    def groups(self) -> int:
        """Return the number of groups of a convolution; 1 for a linear layer."""
        groups: int = getattr(self.modules[0], "groups", 1)
        return groups

    @property
    def channels(self) -> int:
        """Return the number of input channels, or of input features."""
        return self.parameters[0].shape[1] * self.groups

    def __str__(self) -> str:
        """Describe what must be equal on all ranks."""
        weight, _ = self.parameters
        return f"{self.name}: {type(self.modules[0]).__name__} {list(weight.shape)}, groups={self.groups}"


def stepped_by(optimizer: torch.optim.Optimizer) -> set[int]:
    """Return the ids of the parameters that ``optimizer`` steps."""
    return {id(each) for group in optimizer.param_groups for each in group["params"]}


def select(
    model: nn.Module, optimizer: torch.optim.Optimizer, where: Where | None
) -> tuple[list[Target], dict[str, str]]:
    """Return the layers to precondition, in the order of the model, and why the others of ``where`` are left out.

    Raises:
        ValueError: a lazy layer is not initialized, ``where`` selects nothing, or no layer remains.
    """
    stepped = stepped_by(optimizer)
    holders: Holders = defaultdict(list)
    for module in model.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)].append(module)
    candidates = [(name, each) for name, each in model.named_modules() if isinstance(each, _ConvNd | nn.Linear)]
    wanted = [(name or type(each).__name__, each) for name, each in candidates if matches(where, name, each)]
    if where is not None and not wanted:
        raise ValueError(f"precondition(where={where!r}) selects none of {[name for name, _ in candidates]}.")
    found: dict[int, Target] = {}
    left = {}
    for name, module in wanted:
        reason = _reason_to_leave(name, module, stepped, holders)
        weight = module._parameters.get("weight")
        if reason is None:
            found.setdefault(id(weight), Target(name, holders[id(weight)]))
        else:
            left[name] = reason
    if not found:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items()) or "it has none"
        raise ValueError(
            f"precondition: {type(model).__name__} has no linear layer or convolution that can be preconditioned "
            f"({reasons}). Needed are layers with a bias, whose weight and bias the given optimizer steps."
        )
    return list(found.values()), left


def _reason_to_leave(name: str, module: nn.Module, stepped: set[int], holders: Holders) -> str | None:
    weight, bias = (module._parameters.get(each) for each in ("weight", "bias"))
    if isinstance(weight, UninitializedParameter):
        raise ValueError(
            f"{name}: {type(module).__name__} is not initialized. Run one forward pass, then make the optimizer and "
            "call distnorm.precondition."
        )
    if isinstance(module, _ConvTransposeNd):
        return "transposed convolutions are not covered"
    if isinstance(module, Centralized):
        return "its weight is centralized, for the norm that follows it"
    if weight is None or bias is None:
        return "no parameter 'bias'" if weight is not None else "its weight is computed from other parameters"
    tensor = sys.modules.get("torch.distributed.tensor")  # its import takes most of a second
    if tensor is not None and isinstance(weight, tensor.DTensor):
        return "its weight is sharded"
    if not {id(weight), id(bias)} <= stepped:
        return "the optimizer does not step its weight and its bias"
    sharing = [*holders[id(weight)], *holders[id(bias)]]
    if not all(_holds(each, weight, bias) for each in sharing):
        return "it shares its weight or its bias, but not both, with another layer"
    return None


def _holds(module: nn.Module, weight: Tensor, bias: Tensor) -> bool:
    held = module._parameters
    return isinstance(module, _ConvNd | nn.Linear) and held.get("weight") is weight and held.get("bias") is bias
