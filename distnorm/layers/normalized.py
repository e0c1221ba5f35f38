"""Layers that compute with normalized weights: length and direction of each output filter are parameters of their own.

    w = g v / |v|

``v`` is the layer's parameter ``weight``, and ``g`` its parameter ``gain``, of shape [output channels]. Salimans &
Kingma, "Weight Normalization", NeurIPS 2016. ``gain`` starts as |v|, so the function does not change when a layer is
converted. Their initialization from the data of a first batch is left out: the next norm would undo it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from distnorm.compat.dispatch_state import is_fake
from distnorm.layers.reweighted import (
    Reweighted,
    ReweightedConv,
    ReweightedConvTranspose1d,
    ReweightedConvTranspose2d,
    ReweightedConvTranspose3d,
    ReweightedLinear,
)
from distnorm.layers.untrained import watch
from distnorm.methods.base import compute_dtype

logger = logging.getLogger("distnorm")

_SHORTEST = 1e-12
"""The length by which shorter filters are divided, so that filters of zeros are not divided by 0."""


class Normalized(Reweighted):
    """A layer that computes with ``gain * weight / |weight|`` per output filter, in training and in evaluation."""

    if TYPE_CHECKING:
        gain: nn.Parameter

    def effective_weight(self, weight: Tensor) -> Tensor:
        """Return ``weight`` with the length of each output filter set to ``gain``."""
        parts, dims = self.filters(weight)
        wide = parts.to(compute_dtype(weight.dtype))
        length = torch.linalg.vector_norm(wide, dim=dims, keepdim=True)
        scale = self.gain.to(wide.dtype).reshape(length.shape) / length.clamp_min(_SHORTEST)
        computed: Tensor = (wide * scale).to(weight.dtype).reshape(weight.shape)
        return computed

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """Return the length of each output filter of the parameter, ``[output channels]``."""
        parts, dims = self.filters(self.weight)
        wide = parts.to(compute_dtype(parts.dtype))
        lengths: Tensor = torch.linalg.vector_norm(wide, dim=dims).flatten().to(parts.dtype)
        return lengths

    def has_zero_filters(self) -> bool:
        """Return whether the values of the parameter are known and some output filter has only zeros."""
        return not (self.weight.is_meta or is_fake(self.weight)) and not bool(self.lengths().all())

    def start(self, *, trained: bool) -> None:
        """Add the parameter ``gain``. It requires a gradient if the weight does."""
        self._set_gain()
        watch(cast(nn.Module, self))

    def _added_parameters(self) -> dict[str, nn.Parameter]:
        return {f"{self._name}.gain": self.gain}

    def stop(self) -> None:
        """Remove ``gain``."""
        del self._parameters["gain"]

    def check_bake(self) -> None:
        """Raise also if an engine has sharded the layer: it would put the parameter ``gain`` back."""
        super().check_bake()
        if type(self.gain) is not nn.Parameter:
            raise RuntimeError(
                f"{self._name}: an engine has sharded the parameter 'gain', and would put it back. Load the whole "
                "state_dict into a converted model that is not sharded, and revert that."
            )

    def _set_gain(self) -> None:
        self._parameters["gain"] = nn.Parameter(self.lengths(), requires_grad=self.weight.requires_grad)

    def reset_parameters(self) -> None:
        """Initialize the weight as torch does, and ``gain`` as its lengths."""
        super().reset_parameters()  # type: ignore[misc]
        with torch.no_grad():
            self.gain.copy_(self.lengths())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        *rest: Any,
    ) -> None:
        """Load. A checkpoint of stock layers has no gain: set it to the lengths, for the stock layer's function."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)  # type: ignore[misc]
        name = f"{prefix}gain"
        if f"{prefix}weight" not in state_dict or name in state_dict:
            return
        if name in missing:
            missing.remove(name)
        if local_metadata.get("assign_to_params_buffers"):
            self._set_gain()
        else:
            with torch.no_grad():
                self.gain.copy_(self.lengths())
        logger.info(
            "distnorm: the checkpoint has no %s; it is set to the lengths of the filters in %sweight", name, prefix
        )


class NormalizedConv1d(Normalized, ReweightedConv, nn.Conv1d):
    """``nn.Conv1d`` with a normalized weight."""


class NormalizedConv2d(Normalized, ReweightedConv, nn.Conv2d):
    """``nn.Conv2d`` with a normalized weight."""


class NormalizedConv3d(Normalized, ReweightedConv, nn.Conv3d):
    """``nn.Conv3d`` with a normalized weight."""


class NormalizedLinear(Normalized, ReweightedLinear):
    """``nn.Linear`` with a normalized weight."""


class NormalizedConvTranspose1d(Normalized, ReweightedConvTranspose1d):
    """``nn.ConvTranspose1d`` with a normalized weight."""


class NormalizedConvTranspose2d(Normalized, ReweightedConvTranspose2d):
    """``nn.ConvTranspose2d`` with a normalized weight."""


class NormalizedConvTranspose3d(Normalized, ReweightedConvTranspose3d):
    """``nn.ConvTranspose3d`` with a normalized weight."""


TARGETS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: NormalizedConv1d,
    nn.Conv2d: NormalizedConv2d,
    nn.Conv3d: NormalizedConv3d,
    nn.ConvTranspose1d: NormalizedConvTranspose1d,
    nn.ConvTranspose2d: NormalizedConvTranspose2d,
    nn.ConvTranspose3d: NormalizedConvTranspose3d,
    nn.Linear: NormalizedLinear,
}
