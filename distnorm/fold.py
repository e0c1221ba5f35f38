"""Fold norms into the convolutions and linear layers before them, for inference."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from distnorm.convert import as_stock
from distnorm.fusion import epilogue
from distnorm.layers import feeders, overlap, weights
from distnorm.layers.module import DistNorm
from distnorm.layers.running_statistics import running_of, seen

ModelT = TypeVar("ModelT", bound=nn.Module)
Feeder = _ConvNd | nn.Linear

# Exact types only: a subclass may do more than multiply.
_FEEDERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)


@torch.no_grad()
def fold(model: ModelT) -> ModelT:
    """Return a copy of ``model`` for evaluation, in which norms are part of the layers before them.

    A norm is folded if its evaluation is affine per channel, and its input is the output of a convolution or linear
    layer that goes nowhere else. Other such norms become torch's batch norm. Norms of other methods stay as they are.
    Outputs are equal up to rounding. Issues no collective.

    Raises:
        RuntimeError: torch.fx cannot trace the model. Its parts can be folded one by one.
    """
    folded = copy.deepcopy(model).eval()
    weights.bake(folded)
    for undo in (feeders.release, overlap.release, epilogue.release):
        undo(folded)
    for feeder, norm in list(_pairs(folded)):
        found = norm.recipe.method.folded(seen(norm, running_of(norm)))
        if found is not None:
            _multiply(feeder, *found)
            _replace(folded, norm, _FoldedLinear() if isinstance(feeder, nn.Linear) else nn.Identity())
    as_stock(folded)
    return folded


class _FoldedLinear(nn.Identity):
    """In the place of a norm that normalized the last dimension, as no norm of three dimensions does."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 2:
            raise ValueError(
                "distnorm.fold folded a norm into the linear layer before it, which is right for 2-D inputs only; "
                f"given {input.dim()} dimensions. Fold the parts of the model that have no such norm."
            )
        return input


def _pairs(model: nn.Module) -> Iterator[tuple[Feeder, DistNorm]]:
    """Yield each norm with the layer before it, if the output of that goes to the norm only."""
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        raise RuntimeError(
            f"distnorm.fold: torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error}). Fold the "
            "parts that it can trace, such as model.backbone = distnorm.fold(model.backbone)."
        ) from error
    modules = dict(model.named_modules())
    called = [node for node in graph.nodes if node.op == "call_module"]
    calls = Counter(id(modules[node.target]) for node in called)
    read = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
    for node in called:
        norm, before = modules[node.target], node.args[0] if node.args else None
        if not isinstance(norm, DistNorm) or norm._site.inputs or type(norm).forward is not DistNorm.forward:
            continue  # classes with a forward of their own do more than normalize
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        feeder = modules[str(before.target)]
        alone = len(before.users) == 1 and calls[id(norm)] == calls[id(feeder)] == 1
        used = any(name.startswith(f"{before.target}.") for name in read)
        if type(feeder) in _FEEDERS and alone and not used and _is_simple(feeder, norm):
            assert isinstance(feeder, _ConvNd | nn.Linear)
            yield feeder, norm


def _is_simple(feeder: nn.Module, norm: DistNorm) -> bool:
    """Return whether weights are parameters of as many outputs as the norm has features, and nobody hooks between."""
    hooked = feeder._forward_hooks or norm._forward_pre_hooks or norm._forward_hooks
    outputs = feeder.out_features if isinstance(feeder, nn.Linear) else getattr(feeder, "out_channels", 0)
    return not hooked and feeder._parameters.get("weight") is not None and outputs == norm.num_features


def _multiply(feeder: Feeder, scale_C: Tensor, shift_C: Tensor) -> None:
    """Let ``feeder`` compute ``scale_C * y + shift_C`` where it computed ``y``."""
    weight, bias_C = feeder.weight.double(), feeder.bias
    spatial = (1,) * (weight.dim() - 2)
    if isinstance(feeder, _ConvTransposeNd):  # [inputs, outputs / groups, ...]
        grouped = weight.view(feeder.groups, -1, *weight.shape[1:])
        weight = (grouped * scale_C.view(feeder.groups, 1, -1, *spatial)).view_as(weight)
    else:
        weight = weight * scale_C.view(-1, *(1,) * (weight.dim() - 1))
    shift_C = shift_C if bias_C is None else shift_C + bias_C.double() * scale_C
    dtype = feeder.weight.dtype
    feeder.weight, feeder.bias = nn.Parameter(weight.to(dtype)), nn.Parameter(shift_C.to(dtype))


def _replace(model: nn.Module, norm: nn.Module, by: nn.Module) -> None:
    for module in model.modules():
        for name, child in module._modules.items():
            if child is norm:
                module._modules[name] = by.eval()
