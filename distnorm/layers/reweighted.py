"""Layers that compute with a function of their weight, per output filter. By class swap, so state_dict keys stay.

A mixin such as ``Centralized`` gives the function, and one of the forms here runs the layer with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from distnorm.layers.conversion import Conversion
from distnorm.layers.tracing import ScriptedConv, is_traced, leaf


# docs/decisions.md#weights-are-computed-by-class-swap
class Reweighted:
    """A layer that computes with a function of its weight."""

    if TYPE_CHECKING:  # torch.jit.script would use the annotations of a class for its graph
        weight: Tensor
        _norms: tuple[nn.Module, ...]
        _conversion: Conversion
        _name: str
        _parameters: dict[str, nn.Parameter | None]

    def effective_weight(self, weight: Tensor) -> Tensor:
        """Return the weight with which the layer computes."""
        raise NotImplementedError

    def filters(self, weight: Tensor) -> tuple[Tensor, list[int]]:
        """Return ``weight``, in a shape of as many values in the same order, and the dimensions of one filter in it."""
        return weight, list(range(1, weight.dim()))

    def start(self, *, trained: bool) -> None:
        """Prepare a layer whose class was just swapped; ``trained`` if it was trained with its weight as it is."""

    def stop(self) -> None:
        """Undo ``start``, before the layer gets its original class back."""

    def check_bake(self) -> None:
        """Raise a RuntimeError if ``bake`` cannot write the parameter: an engine or a tool of torch has taken it."""
        weight = self._parameters.get("weight")
        if weight is None:
            raise RuntimeError(
                f"{self._name}: the weight is computed from other parameters (a parametrization, pruning), so nothing "
                "can be written into it. Remove that first, as with torch.nn.utils.parametrize.remove_parametrizations "
                "or torch.nn.utils.prune.remove, then revert."
            )
        if weight.dim() < 2:
            raise RuntimeError(
                f"{self._name}: an engine has partitioned the weight into shape {tuple(weight.shape)}. Gather the "
                "parameters of this layer first, as with deepspeed.zero.GatheredParameters(..., modifier_rank=0)."
            )

    @torch.no_grad()
    def bake(self) -> None:
        """Write the weight with which the layer computes into the parameter. The layer is not used again as it is."""
        self.weight.copy_(self.effective_weight(self.weight))

    def __prepare_scriptable__(self) -> Any:
        """Refuse, since scripts use the parameter as it is."""
        raise RuntimeError(
            f"{self._name}: torch.jit.script would use the parameter, not the weight that is computed from it. Script "
            "a reverted copy, which evaluates alike: distnorm.revert(copy.deepcopy(model))."
        )


class ReweightedConv(Reweighted, ScriptedConv):
    """A convolution. One node in torch.fx, so that graphs compute its weight when they run."""

    def _forward(self, input: Tensor) -> Tensor:
        y: Tensor
        if is_traced(input):
            y = leaf(self, input)
        else:
            y = self._conv_forward(input, self.effective_weight(self.weight), self.bias)
        return y


class ReweightedLinear(Reweighted, nn.Linear):
    """A linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the effective weight."""
        if torch.jit.is_scripting():
            return nn.functional.linear(input, self.weight, self.bias)
        else:
            if not isinstance(self, Reweighted):  # reverted, and called by what has wrapped the forward before
                return type(self).forward(self, input)
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if is_traced(input):
            node: Tensor = leaf(self, input)
            return node
        return nn.functional.linear(input, self.effective_weight(self.weight), self.bias)


# Aliases without types, since torch annotates the padding of transposed convolutions with str too, which these
# functions do not accept. torch.jit.script would parse a "type: ignore" comment at the call.
_transposed1: Callable[..., Tensor] = nn.functional.conv_transpose1d
_transposed2: Callable[..., Tensor] = nn.functional.conv_transpose2d
_transposed3: Callable[..., Tensor] = nn.functional.conv_transpose3d


class ReweightedConvTranspose(Reweighted):
    """A transposed convolution, with weights ``[in, out / groups, ...]``."""

    if TYPE_CHECKING:
        groups: int

    def filters(self, weight: Tensor) -> tuple[Tensor, list[int]]:
        """Return ``weight`` with its groups apart: a filter goes over the inputs of its group."""
        if self.groups == 1:
            return weight, [0, *range(2, weight.dim())]
        return weight.unflatten(0, (self.groups, -1)), [1, *range(3, weight.dim() + 1)]

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the effective weight."""
        if torch.jit.is_scripting():
            assert output_size is None, "a scripted layer has one size of output"
            return self._scripted(input)
        else:
            if not isinstance(self, Reweighted):  # reverted, and called by what has wrapped the forward before
                return type(self).forward(self, input, output_size)
            return self._forward(input, output_size)

    def _scripted(self, input: Tensor) -> Tensor:
        """Run in a script, which cannot select a function by number of dimensions. Each subclass defines it."""
        raise NotImplementedError

    def _forward(self, input: Tensor, output_size: list[int] | None) -> Tensor:
        assert isinstance(self, _ConvTransposeNd)
        if is_traced(input):
            node: Tensor = leaf(self, input)
            return node
        weight, extra = self.effective_weight(self.weight), self.output_padding
        if output_size is not None:
            sizes: Iterable[tuple[int, ...]] = zip(
                *(input.shape[-len(extra) :], output_size[-len(extra) :]),
                *(self.kernel_size, self.stride, self.padding, self.dilation),
                strict=True,
            )
            extra = tuple(
                wanted - ((size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
                for size, wanted, kernel, stride, padding, dilation in sizes
            )
        convolve = _TRANSPOSED[len(extra)]
        return convolve(input, weight, self.bias, self.stride, self.padding, extra, self.groups, self.dilation)


class ReweightedConvTranspose1d(ReweightedConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d``."""

    def _scripted(self, input: Tensor) -> Tensor:
        return _transposed1(
            input, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )


class ReweightedConvTranspose2d(ReweightedConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d``."""

    def _scripted(self, input: Tensor) -> Tensor:
        return _transposed2(
            input, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )


class ReweightedConvTranspose3d(ReweightedConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d``."""

    def _scripted(self, input: Tensor) -> Tensor:
        return _transposed3(
            input, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )


_TRANSPOSED = {1: _transposed1, 2: _transposed2, 3: _transposed3}


def is_computed(module: Any) -> bool:
    """Return whether the weight of ``module`` is computed from other parameters, as by weight norm or pruning."""
    has_parts = any(name.startswith("weight_") for name in module._parameters)
    return "weight" not in module._parameters and (has_parts or parametrize.is_parametrized(module, "weight"))
