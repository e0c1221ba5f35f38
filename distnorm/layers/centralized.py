"""Layers whose weight acts centred, per output filter: by class swap, so parameters and state_dict keys stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from distnorm.layers import optimizer_hooks
from distnorm.layers.conversion import Conversion
from distnorm.layers.tracing import ScriptedConv, is_traced, leaf
from distnorm.methods.base import compute_dtype


def centred(weight: Tensor, dims: list[int], *, through: bool = True) -> Tensor:
    """``weight`` less its mean over ``dims``; filters that are centred but for rounding stay bit for bit.

    So it can be applied again, to what a checkpoint holds or what was saved in between, and changes nothing. Without
    ``through`` the gradient is passed on as it is.
    """
    wide = weight.to(compute_dtype(weight.dtype))
    mean = wide.mean(dims, keepdim=True)
    count = 1
    for dim in dims:  # Dynamo of torch 2.13 knows no generators as arguments
        count *= weight.shape[dim]
    # What is left of a mean when values are rounded to the weight's dtype, at random, and arithmetic is.
    narrow, fine = torch.finfo(weight.dtype).eps, torch.finfo(wide.dtype).eps
    rounding = (2 * narrow / math.sqrt(count) + 4 * fine) / math.sqrt(count)
    norm = torch.linalg.vector_norm(wide.detach(), dim=dims, keepdim=True)
    settled = torch.where(mean.detach().abs() <= rounding * norm, mean.detach(), torch.zeros_like(norm))
    shift = mean - settled  # 0 or the mean, with the gradient of the mean
    return (wide - (shift if through else shift.detach())).to(weight.dtype)


class Centralized:
    """A layer whose weight acts centred in training, and in evaluation once there was training."""

    projected = False
    """Whether the optimizer is SGD, which needs no projected gradients."""
    kept = False
    """Whether the hook on optimizers keeps the parameter centred."""
    as_given = False
    """Whether running statistics belong to the weight as it is, as long as there is no training."""
    left = False
    """Whether what it gives goes elsewhere than to a norm, too. A flag, since a name would be a constant of graphs."""

    if TYPE_CHECKING:  # torch.jit.script takes annotations of a class for those of its graph
        weight: Tensor
        _norms: tuple[nn.Module, ...]
        _conversion: Conversion
        _name: str
        _parameters: dict[str, nn.Parameter | None]

    def effective_weight(self, weight: Tensor) -> Tensor:
        """What the layer computes with."""
        if self.is_left() or (self.projected and self.kept):
            return weight
        if any(norm.training for norm in self._norms):
            return self.centred(weight, through=not self.projected)
        return self.centred(weight) if self.is_behind() else weight

    def centred(self, weight: Tensor, *, through: bool = True) -> Tensor:
        """``weight`` with each output filter centred."""
        return centred(weight, list(range(1, weight.dim())), through=through)

    def is_left(self) -> bool:
        """Whether the weight is left alone: it is made of other parameters, or what it gives goes elsewhere too."""
        return self.left or is_computed(self)

    def is_behind(self) -> bool:
        """Whether the parameter stands for its centred values, but may not be centred itself."""
        if self.kept:
            return False
        return self.has_trained() or (self._conversion.feeders.known and not self.as_given)

    def has_trained(self) -> bool:
        """Whether there was training since the model was converted, copied or loaded."""
        return not self._conversion.means_to_fold

    @torch.no_grad()
    def project(self) -> bool:
        """Centre the parameter in place, if it is here; engines that partition parameters leave something flat."""
        weight = self._parameters.get("weight")
        if weight is None or weight.dim() < 2 or self.is_left():
            return False
        weight.copy_(self.centred(weight))
        return True

    def settled(self) -> Tensor | None:
        """Values to save in place of the parameter's, where training goes on with those; else centres the parameter."""
        weight = self._parameters.get("weight")
        if weight is None or weight.dim() < 2 or self.is_left() or not self.is_behind():
            return None
        if self.has_trained():
            return self.centred(weight.detach())
        self.project()
        return None

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle has the values that training computes with."""
        values = self.settled()
        if values is None:
            return self.__dict__
        weight = nn.Parameter(values, requires_grad=self.weight.requires_grad)
        return {**self.__dict__, "_parameters": {**self._parameters, "weight": weight}, "as_given": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """No optimizer keeps a copy's values centred."""
        trained = state.get("kept", False)
        super().__setstate__({name: value for name, value in state.items() if name not in ("projected", "kept")})  # type: ignore[misc]
        self.as_given = self.as_given and not trained
        optimizer_hooks.note(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        if f"{prefix}weight" in state_dict:
            self.kept, self.as_given = False, True

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        values = self.settled()
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if values is not None:
            destination[f"{prefix}weight"] = values

    def __prepare_scriptable__(self) -> Any:
        """This layer, whose parameter then holds what evaluation computes with."""
        if self.settled() is not None:
            raise RuntimeError(
                f"{self._name}: torch.jit.script would take the weight as the engine keeps it, not centred. Script a "
                "stock model, which evaluates alike: distnorm.revert(copy.deepcopy(model))."
            )
        return self


class _CentralizedConv(Centralized, ScriptedConv):
    """Applies the centred weight; one node to torch.fx, so that what is centred is decided when its graph runs."""

    def _forward(self, input: Tensor) -> Tensor:
        y: Tensor
        if is_traced(input):
            y = leaf(self, input)
        else:
            y = self._conv_forward(input, self.effective_weight(self.weight), self.bias)
        return y


class CentralizedConv1d(_CentralizedConv, nn.Conv1d):
    """``nn.Conv1d`` with a centred weight."""


class CentralizedConv2d(_CentralizedConv, nn.Conv2d):
    """``nn.Conv2d`` with a centred weight."""


class CentralizedConv3d(_CentralizedConv, nn.Conv3d):
    """``nn.Conv3d`` with a centred weight."""


class CentralizedLinear(Centralized, nn.Linear):
    """``nn.Linear`` with a centred weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the centred weight."""
        if torch.jit.is_scripting():
            return nn.functional.linear(input, self.weight, self.bias)
        else:
            return self._forward(input)

    def _forward(self, input: Tensor) -> Tensor:
        if is_traced(input):
            node: Tensor = leaf(self, input)
            return node
        return nn.functional.linear(input, self.effective_weight(self.weight), self.bias)


# By other names, for torch says that the padding of transposed convolutions may be text, which these do not take; and
# torch.jit.script reads the comments that would silence a type checker.
_transposed1: Callable[..., Tensor] = nn.functional.conv_transpose1d
_transposed2: Callable[..., Tensor] = nn.functional.conv_transpose2d
_transposed3: Callable[..., Tensor] = nn.functional.conv_transpose3d


class _CentralizedConvTranspose(Centralized):
    """Weights ``[in, out / groups, ...]``."""

    if TYPE_CHECKING:
        groups: int

    def centred(self, weight: Tensor, *, through: bool = True) -> Tensor:
        """``weight`` with each output filter centred: group by group, over the inputs of the group."""
        if self.groups == 1:
            return centred(weight, [0, *range(2, weight.dim())], through=through)
        parts = weight.unflatten(0, (self.groups, -1))
        return centred(parts, [1, *range(3, parts.dim())], through=through).flatten(0, 1)

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Apply the centred weight."""
        if torch.jit.is_scripting():
            assert output_size is None, "a scripted layer has one size of output"
            return self._scripted(input)
        else:
            return self._forward(input, output_size)

    def _scripted(self, input: Tensor) -> Tensor:
        """What a script runs, which can look up no function by the number of dimensions: each class has its own."""
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


class CentralizedConvTranspose1d(_CentralizedConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with a centred weight."""

    def _scripted(self, input: Tensor) -> Tensor:
        return _transposed1(
            input, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )


class CentralizedConvTranspose2d(_CentralizedConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with a centred weight."""

    def _scripted(self, input: Tensor) -> Tensor:
        return _transposed2(
            input, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )


class CentralizedConvTranspose3d(_CentralizedConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with a centred weight."""

    def _scripted(self, input: Tensor) -> Tensor:
        return _transposed3(
            input, self.weight, self.bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )


_TRANSPOSED = {1: _transposed1, 2: _transposed2, 3: _transposed3}
TARGETS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: CentralizedConv1d,
    nn.Conv2d: CentralizedConv2d,
    nn.Conv3d: CentralizedConv3d,
    nn.ConvTranspose1d: CentralizedConvTranspose1d,
    nn.ConvTranspose2d: CentralizedConvTranspose2d,
    nn.ConvTranspose3d: CentralizedConvTranspose3d,
    nn.Linear: CentralizedLinear,
}
ORIGINALS = {target: original for original, target in TARGETS.items()}
OURS = ("projected", "kept", "as_given", "left", "_norms", "_conversion", "_name")


def is_computed(module: Any) -> bool:
    """Whether the weight of ``module`` is made of other parameters: by weight norm, spectral norm, pruning and such."""
    made = any(name.startswith("weight_") for name in module._parameters)
    return "weight" not in module._parameters and (made or parametrize.is_parametrized(module, "weight"))
