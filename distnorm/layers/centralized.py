"""Layers that compute with centred weights, per output filter. By class swap, so state_dict keys do not change."""

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
    """Return ``weight - mean(weight)`` over ``dims``; filters that are centred up to rounding do not change.

    So the function is idempotent, and does not change the weights of a checkpoint. With ``through`` the gradient is
    projected too, else it is passed on unchanged.
    """
    wide = weight.to(compute_dtype(weight.dtype))
    mean = wide.mean(dims, keepdim=True)
    count = 1
    for dim in dims:  # Dynamo of torch 2.13 does not support generators as arguments
        count *= weight.shape[dim]
    # Bound of a mean that comes only from rounding values to the weight's dtype, and from the arithmetic here.
    narrow, fine = torch.finfo(weight.dtype).eps, torch.finfo(wide.dtype).eps
    rounding = (2 * narrow / math.sqrt(count) + 4 * fine) / math.sqrt(count)
    norm = torch.linalg.vector_norm(wide.detach(), dim=dims, keepdim=True)
    ignored = torch.where(mean.detach().abs() <= rounding * norm, mean.detach(), torch.zeros_like(norm))
    shift = mean - ignored  # 0 or the mean, with the gradient of the mean
    return (wide - (shift if through else shift.detach())).to(weight.dtype)


class Centralized:
    """A layer that computes with a centred weight in training, and in evaluation after training."""

    projected = False
    """Whether the optimizer is SGD, which needs no projected gradients."""
    kept = False
    """Whether the optimizer hooks keep the parameter centred."""
    as_given = False
    """Whether the running statistics were computed with the uncentred weight, so that evaluation must use it."""
    left = False
    """Whether outputs also go to other modules than norms. A flag, since graphs would hold a name as a constant."""

    if TYPE_CHECKING:  # torch.jit.script would use the annotations of a class for its graph
        weight: Tensor
        _norms: tuple[nn.Module, ...]
        _conversion: Conversion
        _name: str
        _parameters: dict[str, nn.Parameter | None]

    def effective_weight(self, weight: Tensor) -> Tensor:
        """Return the weight with which the layer computes."""
        if self.is_excluded() or (self.projected and self.kept):
            return weight
        if any(norm.training for norm in self._norms):
            return self.centred(weight, through=not self.projected)
        return self.centred(weight) if self.is_pending() else weight

    def centred(self, weight: Tensor, *, through: bool = True) -> Tensor:
        """Return ``weight`` with each output filter centred."""
        return centred(weight, list(range(1, weight.dim())), through=through)

    def is_excluded(self) -> bool:
        """Return whether the weight is not centred: it is computed from other parameters, or outputs go elsewhere."""
        return self.left or is_computed(self)

    def is_pending(self) -> bool:
        """Return whether the layer computes with centred values that may not be in the parameter yet."""
        if self.kept:
            return False
        return self.has_trained() or (self._conversion.feeders.known and not self.as_given)

    def has_trained(self) -> bool:
        """Return whether the model has trained since it was converted, copied or loaded."""
        return not self._conversion.resume_pending

    @torch.no_grad()
    def project(self) -> bool:
        """Centre the parameter in place and return True; return False if an engine has partitioned it (1-D)."""
        weight = self._parameters.get("weight")
        if weight is None or weight.dim() < 2 or self.is_excluded():
            return False
        weight.copy_(self.centred(weight))
        return True

    def values_to_save(self) -> Tensor | None:
        """Return centred values to save instead of the parameter's, or None if the parameter is saved.

        After training, the parameter must not change, since an optimizer may step a copy of it. Before, it is centred
        in place.
        """
        weight = self._parameters.get("weight")
        if weight is None or weight.dim() < 2 or self.is_excluded() or not self.is_pending():
            return None
        if self.has_trained():
            return self.centred(weight.detach())
        self.project()
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Give copies and pickles the values with which training computes."""
        values = self.values_to_save()
        if values is None:
            return self.__dict__
        weight = nn.Parameter(values, requires_grad=self.weight.requires_grad)
        return {**self.__dict__, "_parameters": {**self._parameters, "weight": weight}, "as_given": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy. No optimizer steps it yet, so nothing keeps its parameter centred."""
        trained = state.get("kept", False)
        super().__setstate__({name: value for name, value in state.items() if name not in ("projected", "kept")})  # type: ignore[misc]
        self.as_given = self.as_given and not trained
        optimizer_hooks.register(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        if f"{prefix}weight" in state_dict:
            self.kept, self.as_given = False, True

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        values = self.values_to_save()
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        if values is not None:
            destination[f"{prefix}weight"] = values

    def __prepare_scriptable__(self) -> Any:
        """Return this layer, after its parameter has been centred as evaluation requires."""
        if self.values_to_save() is not None:
            raise RuntimeError(
                f"{self._name}: torch.jit.script would use the parameter, which is not centred. Script a reverted "
                "copy, which evaluates alike: distnorm.revert(copy.deepcopy(model))."
            )
        return self


class _CentralizedConv(Centralized, ScriptedConv):
    """A convolution with a centred weight. One node in torch.fx, so that graphs decide at run time what to centre."""

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


# Aliases without types, since torch annotates the padding of transposed convolutions with str too, which these
# functions do not accept. torch.jit.script would parse a "type: ignore" comment at the call.
_transposed1: Callable[..., Tensor] = nn.functional.conv_transpose1d
_transposed2: Callable[..., Tensor] = nn.functional.conv_transpose2d
_transposed3: Callable[..., Tensor] = nn.functional.conv_transpose3d


class _CentralizedConvTranspose(Centralized):
    """Weights ``[in, out / groups, ...]``."""

    if TYPE_CHECKING:
        groups: int

    def centred(self, weight: Tensor, *, through: bool = True) -> Tensor:
        """Return ``weight`` with each output filter centred: group by group, over the inputs of the group."""
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
    """Return whether the weight of ``module`` is computed from other parameters, as by weight norm or pruning."""
    has_parts = any(name.startswith("weight_") for name in module._parameters)
    return "weight" not in module._parameters and (has_parts or parametrize.is_parametrized(module, "weight"))
