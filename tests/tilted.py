"""Methods that use all of the interface, and independent implementations of them over the joined batch.

``Tilted`` has a parameter, a buffer that its transform depends on, and two shares, one with a weight that carries
gradient. ``Peaked`` shares maxima too, and takes a further input. Neither is a good normalization.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, final

import torch
from torch import Tensor

from distnorm.methods import BatchNorm, Declared, Layer, Method, Share, Shared
from distnorm.methods.base import per_channel


def _over_channels(x_NCL: Tensor) -> Tensor:
    return x_NCL.transpose(0, 1).flatten(1)


def _log(means_C: Tensor) -> Tensor:
    return (means_C + 2).log()


class _Base(Method):
    def declare(self, features: int) -> Declared:
        return Declared(
            {"slope": torch.linspace(0.5, 1.5, 2 * features).view(2, features)},
            {"level": torch.full((features,), 0.25)},
        )

    def _transform(self, x_NCL: Tensor, share: Share, layer: Layer) -> Tensor:
        x_CM = _over_channels(x_NCL.double())
        soft_CM = x_CM.sigmoid()
        mean_C, _ = share(x_CM.sum(1), x_CM.shape[1])
        log_C, weight_C = share((soft_CM * x_CM.square()).sum(1), soft_CM.sum(1), _log, name="soft")
        slope_KC, level_C = layer.parameters["slope"], layer.buffers["level"]
        assert slope_KC is not None and level_C is not None
        scale_C = slope_KC[0] * (-log_C).exp() * (1 + weight_C / weight_C.sum().clamp_min(1))
        shift_C = slope_KC[1] * level_C - mean_C * scale_C
        return self._affine(x_NCL, scale_C, shift_C, layer)

    def _affine(self, x_NCL: Tensor, scale_C: Tensor, shift_C: Tensor, layer: Layer) -> Tensor:
        weight_C, bias_C = layer.parameters["weight"], layer.parameters["bias"]
        scale_C = scale_C if weight_C is None else scale_C * weight_C
        shift_C = shift_C if weight_C is None else shift_C * weight_C
        shift_C = shift_C if bias_C is None else shift_C + bias_C
        return (x_NCL * per_channel(scale_C, x_NCL) + per_channel(shift_C, x_NCL)).to(x_NCL.dtype)

    def _coefficients(self, layer: Layer) -> tuple[Tensor, Tensor]:
        slope_KC, level_C = layer.parameters["slope"], layer.buffers["level"]
        assert slope_KC is not None and level_C is not None
        return slope_KC[0].double(), slope_KC[1] * level_C.double()

    def targets(self, shared: Mapping[str, Shared], layer: Layer) -> Mapping[str, Tensor]:
        weight_C = shared["soft"].weight
        return {
            "level": shared["soft"].means + weight_C / weight_C.sum().clamp_min(1),
            "running_mean": shared[""].means,
        }


@final
@dataclass(frozen=True, kw_only=True)
class Tilted(_Base):
    """y = (x scale + shift) weight + bias, with the scale from a weighted second moment and the share of its weight."""

    def normalize(self, x_NCL: Tensor, share: Share, layer: Layer, *inputs: Tensor) -> Tensor:
        return self._transform(x_NCL, share, layer)

    def evaluate(self, x_NCL: Tensor, layer: Layer, *inputs: Tensor) -> Tensor:
        return self._affine(x_NCL, *self._coefficients(layer), layer)

    def folded(self, layer: Layer) -> tuple[Tensor, Tensor] | None:
        scale_C, shift_C = self._coefficients(layer)
        weight_C, bias_C = layer.parameters["weight"], layer.parameters["bias"]
        scale_C = scale_C if weight_C is None else scale_C * weight_C
        shift_C = shift_C if weight_C is None else shift_C * weight_C
        return scale_C, shift_C if bias_C is None else shift_C + bias_C


@final
@dataclass(frozen=True, kw_only=True)
class Peaked(_Base):
    """As ``Tilted``, divided by 1 + the maximum of all values, plus a further input."""

    inputs: ClassVar[tuple[str, ...]] = ("offset",)
    needs_max: ClassVar[bool] = True

    def normalize(self, x_NCL: Tensor, share: Share, layer: Layer, *inputs: Tensor) -> Tensor:
        x_CM = _over_channels(x_NCL.double())
        local_C = x_CM.amax(1) if x_CM.shape[1] else x_CM.sum(1) - torch.inf
        peak_C, _ = share(local_C, (x_CM == local_C[:, None]).sum(1), torch.exp, name="peak", op="max")
        y_NCL = self._transform(x_NCL, share, layer)
        return (y_NCL / per_channel(1 + peak_C, x_NCL) + inputs[0]).to(x_NCL.dtype)

    def evaluate(self, x_NCL: Tensor, layer: Layer, *inputs: Tensor) -> Tensor:
        return self._affine(x_NCL, *self._coefficients(layer), layer) + inputs[0]

    def examples(self, x_NCL: Tensor) -> tuple[Tensor, ...]:
        return (x_NCL.new_zeros(x_NCL.shape[1]).view(1, -1, *(1,) * (x_NCL.dim() - 2)),)


@final
@dataclass(frozen=True, kw_only=True)
class Gated(Method):
    """Batch norm, computed by the kernels, times a gate of each sample's own mean: declared parameters only."""

    core: ClassVar[BatchNorm] = BatchNorm()

    @property
    def follows(self) -> bool:
        return False

    def declare(self, features: int) -> Declared:
        return Declared({"gate": torch.full((features,), 0.5)})

    def normalize(self, x_NCL: Tensor, share: Share, layer: Layer, *inputs: Tensor) -> Tensor:
        return self._gated(share.affine(x_NCL, self.core, layer), x_NCL, layer)

    def evaluate(self, x_NCL: Tensor, layer: Layer, *inputs: Tensor) -> Tensor:
        return self._gated(self.core.evaluate(x_NCL, layer), x_NCL, layer)

    def _gated(self, y_NCL: Tensor, x_NCL: Tensor, layer: Layer) -> Tensor:
        gate_C = layer.parameters["gate"]
        assert gate_C is not None
        mean_NC = x_NCL.mean([dim for dim in range(2, x_NCL.dim())], keepdim=True) if x_NCL.dim() > 2 else x_NCL
        return (y_NCL * (mean_NC * per_channel(gate_C, x_NCL)).sigmoid()).to(x_NCL.dtype)


class Joined(NamedTuple):
    """Outputs per rank, and the targets of ``level`` and ``running_mean``."""

    outputs: list[Tensor]
    level: Tensor
    mean: Tensor


def joined(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    slope: Tensor,
    level: Tensor,
    offset: Tensor | None = None,
) -> Joined:
    """``Tilted``, or ``Peaked`` with an ``offset``, of the joined batch: plain operations, float64."""
    x = torch.cat([each.transpose(0, 1).flatten(1) for each in inputs], 1)
    soft = x.sigmoid()
    total = soft.sum(1)
    second = (soft * x.square()).sum(1) / total
    scale = slope[0] / (second + 2) * (1 + total / total.sum().clamp_min(1))
    shift = slope[1] * level - x.mean(1) * scale

    def one(given: Tensor) -> Tensor:
        spread = (1, -1, *(1,) * (given.dim() - 2))
        y = given * (scale * weight).view(spread) + (shift * weight + bias).view(spread)
        if offset is None:
            return y
        return y / (1 + x.amax(1).exp()).view(spread) + offset.view(spread)

    return Joined([one(each) for each in inputs], second + total / total.sum().clamp_min(1), x.mean(1))
