"""A layer as torch.jit.script compiles it: from evaluation, without anything of distnorm."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.layers.site import Site
from distnorm.methods import BatchNorm, ChannelAffine, Method


def scriptable(layer: _BatchNorm, site: Site, method: Method) -> nn.Module:
    """Return a module that evaluates as ``layer`` does, with the same parameters and buffers.

    Raises:
        RuntimeError: the layer trains, or does not evaluate as torch's batch norm does.
    """
    if layer.training:
        raise RuntimeError(
            f"{site.name}: torch.jit.script cannot share statistics in training. Script the model in evaluation, "
            "model.eval(), or a stock one, distnorm.revert(model)."
        )
    if not isinstance(method, ChannelAffine):
        raise RuntimeError(
            f"{site.name}: torch.jit.script cannot compile {method}. Script distnorm.fold(model) or "
            "distnorm.revert(model) where these can replace it, or use torch.export on the model in eval()."
        )
    if layer.running_mean is None and not isinstance(method, BatchNorm):
        raise RuntimeError(
            f"{site.name}: without running statistics torch.jit.script supports batch norm only; this is {method}."
        )
    return _Evaluation(layer, site.name).eval()


class _Evaluation(nn.Module):
    if TYPE_CHECKING:  # torch.jit.script would use the annotations of a class for its graph
        weight: Tensor | None
        bias: Tensor | None
        running_mean: Tensor | None
        running_var: Tensor | None

    __constants__ = ["eps", "place"]  # noqa: RUF012

    def __init__(self, layer: _BatchNorm, place: str) -> None:
        super().__init__()
        self.eps, self.place = layer.eps, place
        for name, parameter in (("weight", layer.weight), ("bias", layer.bias)):
            self.register_parameter(name, parameter)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(layer, name))

    def forward(self, input: Tensor, residual: Tensor | None = None, relu: bool = False, widen: bool = True) -> Tensor:
        if self.training:
            raise RuntimeError(f"{self.place}: scripted in evaluation, so it cannot train; call eval().")
        mean_C, var_C = self.running_mean, self.running_var
        dtype = input.dtype if mean_C is None else mean_C.dtype
        weight_C = None if self.weight is None else self.weight.to(dtype)
        bias_C = None if self.bias is None else self.bias.to(dtype)
        y_NCL = F.batch_norm(input, mean_C, var_C, weight_C, bias_C, mean_C is None and var_C is None, 0.0, self.eps)
        if residual is not None:
            y_NCL = y_NCL + residual if widen else y_NCL.add_(residual)
        return torch.relu(y_NCL) if relu else y_NCL
