"""Layers that compute with centred weights, W - mean of W per output filter, and keep the parameter itself centred.

It replaces the centring of activations, which RMS lacks. Yan et al., ICLR 2020 (CenConv2d in their code). Training
computes with the centred weight, and gradients pass through the projection. After every optimizer step the parameter
itself is centred, in place. So a state_dict holds the weights with which training computed, also for stock models, and
aliases of the parameter stay valid: docs/decisions.md#centralized-weights-are-kept-in-the-parameters.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from distnorm.layers import optimizer_hooks
from distnorm.layers.reweighted import (
    Reweighted,
    ReweightedConv,
    ReweightedConvTranspose1d,
    ReweightedConvTranspose2d,
    ReweightedConvTranspose3d,
    ReweightedLinear,
    is_computed,
)
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
    shifted = wide - (shift if through else shift.detach())
    # The mean was rounded as a value of its own size, which may be far above that of what is left.
    rest = shifted.detach().mean(dims, keepdim=True)
    return (shifted - torch.where(shift.detach() == 0, torch.zeros_like(rest), rest)).to(weight.dtype)


class Centralized(Reweighted):
    """A layer that computes with a centred weight in training, and in evaluation after training."""

    projected = False
    """Whether the optimizer is SGD, which needs no projected gradients."""
    kept = False
    """Whether the optimizer hooks keep the parameter centred."""
    as_given = False
    """Whether the running statistics were computed with the uncentred weight, so that evaluation must use it."""
    left = False
    """Whether outputs also go to other modules than norms. A flag, since graphs would hold a name as a constant."""

    def effective_weight(self, weight: Tensor) -> Tensor:
        """Return the weight with which the layer computes."""
        if self.is_excluded() or (self.projected and self.kept):
            return weight
        if any(norm.training for norm in self._norms):
            return self.centred(weight, through=not self.projected)
        return self.centred(weight) if self.is_pending() else weight

    def centred(self, weight: Tensor, *, through: bool = True) -> Tensor:
        """Return ``weight`` with each output filter centred."""
        parts, dims = self.filters(weight)
        return centred(parts, dims, through=through).reshape(weight.shape)

    def start(self, *, trained: bool) -> None:
        """Let optimizer steps centre the parameter; the weight of a ``trained`` layer evaluates as it is at first."""
        self.as_given = trained
        optimizer_hooks.register(self)

    def stop(self) -> None:
        """Undo ``start``; the parameter does not change."""
        optimizer_hooks.unregister(self)

    def check_bake(self) -> None:
        """Accept every layer: what cannot be written is not centred, or was centred by its engine."""

    def bake(self) -> None:
        """Centre the parameter, unless the layer computes with it as it is."""
        if self.is_pending():
            self.project()

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
        return self if self.values_to_save() is None else super().__prepare_scriptable__()


class CentralizedConv1d(Centralized, ReweightedConv, nn.Conv1d):
    """``nn.Conv1d`` with a centred weight."""


class CentralizedConv2d(Centralized, ReweightedConv, nn.Conv2d):
    """``nn.Conv2d`` with a centred weight."""


class CentralizedConv3d(Centralized, ReweightedConv, nn.Conv3d):
    """``nn.Conv3d`` with a centred weight."""


class CentralizedLinear(Centralized, ReweightedLinear):
    """``nn.Linear`` with a centred weight."""


class CentralizedConvTranspose1d(Centralized, ReweightedConvTranspose1d):
    """``nn.ConvTranspose1d`` with a centred weight."""


class CentralizedConvTranspose2d(Centralized, ReweightedConvTranspose2d):
    """``nn.ConvTranspose2d`` with a centred weight."""


class CentralizedConvTranspose3d(Centralized, ReweightedConvTranspose3d):
    """``nn.ConvTranspose3d`` with a centred weight."""


TARGETS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: CentralizedConv1d,
    nn.Conv2d: CentralizedConv2d,
    nn.Conv3d: CentralizedConv3d,
    nn.ConvTranspose1d: CentralizedConvTranspose1d,
    nn.ConvTranspose2d: CentralizedConvTranspose2d,
    nn.ConvTranspose3d: CentralizedConvTranspose3d,
    nn.Linear: CentralizedLinear,
}
