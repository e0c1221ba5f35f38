"""Generalized batch norm by quantiles: exactly for a local batch, or by a threshold that follows for additive sums.

For an alpha in (0, 1), q is the alpha-quantile of m values, the ceil(alpha m)-th smallest. The superquantile is
``CVaR = q + sum [x - q]+ / ((1 - alpha) m)``, the mean of the largest (1 - alpha) m values. D = CVaR - mean.

Order statistics are not additive over ranks. Let C be a threshold near q that all ranks have. With p the part of the
values above C, u the mean of ``x`` over those and zeros for the others, and r = p / (1 - alpha),

    D = (u / (1 - alpha) - r mean) / (1 - (1 - r) t),        S = mean + t D

where t is the place of the quantile between mean and CVaR, in units of D. It depends on the shape of the distribution
only. Both are exact for C = q and the right t, and off by the square of C - q otherwise. With C and t constant they are
differentiable, move and scale with x.

t averages, as the running statistics do, where each batch has its quantile by a step of Newton's method from C,
``(C - mean) / D + (p - (1 - alpha)) / (f D)`` with a normal density f: a Robbins-Monro iteration, which ends where the
quantile is, whatever the density. C follows S. Where p is far from 1 - alpha, as in the first step, which has no
threshold yet, S and D are those of a normal distribution with the batch's mean and variance.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from distnorm.methods.base import Declared, Layer, Share, Shared, per_channel
from distnorm.methods.gbn import Deviation, log_scale, values_per_channel
from distnorm.validation import Level, check_fields

_TINY = 1e-30


class Quantile(Deviation):
    """S is the ``level``-quantile, D the distance from the mean of all values to that of the values above S."""

    exact: bool

    @property
    @abstractmethod
    def level(self) -> float:
        """Return alpha."""

    @property
    def follows(self) -> bool:
        """Return whether there is a threshold."""
        return not self.exact

    def declare(self, features: int) -> Declared:
        """Declare the threshold that follows the quantile, unless it is computed exactly."""
        return Declared() if self.exact else Following(self.level).declare(features)

    def share_pair(self, x_NCL: Tensor, share: Share, layer: Layer) -> Tensor:
        """Share the local quantile and deviation if exact, else sums about the threshold."""
        count = values_per_channel(x_NCL)
        if self.exact:
            sums_KC = torch.stack(exact_pair(x_NCL, self.level)) * count
        else:
            sums_KC = Following(self.level).sums(x_NCL, layer)

        def link(means_KC: Tensor) -> Tensor:
            statistic_C, deviation_C = self._pair_of(means_KC, layer)
            return torch.stack((statistic_C, log_scale(deviation_C, layer.eps)))

        return share(sums_KC, count, link)[0]

    def pair(self, shared: Mapping[str, Shared], layer: Layer) -> tuple[Tensor, Tensor]:
        """Return the quantile and the deviation."""
        return self._pair_of(shared[""].means, layer)

    def _pair_of(self, means_KC: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        if self.exact:
            quantile_C, deviation_C = means_KC.unbind()
            return quantile_C, deviation_C
        return Following(self.level).pair(means_KC, layer)

    def targets(self, shared: Mapping[str, Shared], layer: Layer) -> Mapping[str, Tensor]:
        """Return the running statistics, and where the threshold moves."""
        running = super().targets(shared, layer)
        return running if self.exact else {**running, **Following(self.level).targets(shared[""].means, layer)}


@final
@dataclass(frozen=True, kw_only=True)
class SQD(Quantile):
    """S is the ``alpha``-quantile, D the superquantile deviation ``CVaR_alpha - mean``.

    After S, a part 1 - alpha of the values is above 0, and their mean plus the distance of S from the mean is 1: D is
    what a ReLU of ``x - S`` lets through. For alpha = 0.5 the pair is ``MAD``.

    Args:
        alpha: the level of the quantile.
        exact: whether the quantile of the local batch is computed, exactly, for policies that share nothing; with
            others, quantiles and deviations of ranks would be averaged. If not, it is that of all ranks, by a
            threshold that follows it (``distnorm/methods/quantile.py``).
    """

    alpha: Level = 0.7
    exact: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)

    @property
    def level(self) -> float:
        """Return ``alpha``."""
        return self.alpha


@final
@dataclass(frozen=True, kw_only=True)
class MAD(Quantile):
    """S is the median, D the mean distance from it. ``exact``: as in ``SQD``, whose pair it is for alpha = 0.5."""

    exact: bool = False

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)

    @property
    def level(self) -> float:
        """Return one half."""
        return 0.5


def exact_pair(values_NCL: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the quantile and the superquantile deviation of each channel, float64; zeros without values."""
    values_CM = values_NCL.transpose(0, 1).flatten(1)
    count = values_CM.shape[1]
    if not count:
        return (values_CM.sum(1, dtype=torch.float64),) * 2
    quantile_C = values_CM.kthvalue(max(1, math.ceil(alpha * count - 1e-9)), 1).values
    above_CM = (values_CM - quantile_C[:, None]).relu()
    # Sums of differences from the quantile, so that large means cost no accuracy.
    superquantile_C = above_CM.sum(1, dtype=torch.float64) / ((1 - alpha) * count)
    mean_C = (values_CM - quantile_C[:, None]).sum(1, dtype=torch.float64) / count
    return quantile_C.double(), superquantile_C - mean_C


class Following(NamedTuple):
    """The threshold of a layer for the ``alpha``-quantile, in buffers of the layer.

    ``threshold`` ``[C]`` averages S from zero on, with ``threshold_weight``: C is their ratio, and there is none while
    the weight is 0. ``position`` ``[C]`` is t.
    """

    alpha: float

    def declare(self, features: int) -> Declared:
        """Declare the buffers, with the place of the quantile in a normal distribution."""
        quantile, deviation, _ = _normal(torch.full((features,), self.alpha, dtype=torch.float64))
        return Declared(
            buffers={
                "threshold": torch.zeros(features),
                "threshold_weight": torch.zeros(1),
                "position": (quantile / deviation).float(),
            }
        )

    def sums(self, values_NCL: Tensor, layer: Layer) -> Tensor:
        """Return sums ``[4, C]`` of x, of x^2, of x over the threshold, and the number of the latter; float64."""
        dims = [dim for dim in range(values_NCL.dim()) if dim != 1]
        count = max(1, values_NCL.numel() // values_NCL.shape[1])
        pivot_C = values_NCL.detach().sum(dims) / count
        centred_NCL = values_NCL - per_channel(pivot_C, values_NCL)
        over_NCL = values_NCL > per_channel(self._threshold(layer), values_NCL)

        def total(each_NCL: Tensor) -> Tensor:
            return each_NCL.sum(dims, dtype=torch.float64)

        over_C, sum_C, pivot_C = total(over_NCL), total(centred_NCL), pivot_C.double()
        number = values_NCL.numel() // values_NCL.shape[1]
        square_C = total(centred_NCL.square()) + 2 * pivot_C * sum_C + number * pivot_C.square()
        upper_C = total(centred_NCL * over_NCL) + pivot_C * over_C
        return torch.stack((sum_C + number * pivot_C, square_C, upper_C, over_C))

    def pair(self, means_KC: Tensor, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return S and D of shared means."""
        quantile, deviation, _ = _normal(means_KC.new_full((), self.alpha))
        mean_C, square_C, upper_C, over_C = means_KC.unbind()
        near_C = self._is_near(over_C, layer)
        ratio_C = torch.where(near_C, over_C.detach() / (1 - self.alpha), 1)
        position_C = self._position(layer)
        excess_C = (upper_C / (1 - self.alpha) - ratio_C * mean_C).clamp_min(0)
        followed_C = excess_C / (1 - (1 - ratio_C) * position_C)
        std_C = (square_C - mean_C.square()).clamp_min(_TINY).sqrt()
        normal_C = torch.where(near_C, position_C * followed_C, quantile * std_C)
        return mean_C + normal_C, torch.where(near_C, followed_C, deviation * std_C)

    def targets(self, means_KC: Tensor, layer: Layer) -> Mapping[str, Tensor]:
        """Return S for the threshold, and the place at which a step of Newton's method sees the quantile."""
        statistic_C, deviation_C = self.pair(means_KC, layer)
        mean_C, _, _, over_C = means_KC.unbind()
        position_C, weight = self._position(layer), layer.declared("threshold_weight")
        step_C = _normal(means_KC.new_full((), self.alpha))[2] * (over_C - (1 - self.alpha))
        seen_C = (self._threshold(layer) - mean_C) / deviation_C.clamp_min(_TINY) + step_C
        seen_C = torch.where(self._is_near(over_C, layer), seen_C, position_C)
        return {
            "threshold": statistic_C,
            "threshold_weight": torch.ones_like(weight),
            "position": seen_C.clamp((self.alpha - 1) / self.alpha, 1),
        }

    def _threshold(self, layer: Layer) -> Tensor:
        return layer.declared("threshold") / layer.declared("threshold_weight").clamp_min(_TINY)

    def _position(self, layer: Layer) -> Tensor:
        return layer.declared("position").double()

    def _is_near(self, over_C: Tensor, layer: Layer) -> Tensor:
        """Return where a threshold exists and is near the quantile: too few or too many values above it are not."""
        low, high = (1 - self.alpha) / 4, 1 - self.alpha / 4
        return (layer.declared("threshold_weight") > 0) & (over_C > low) & (over_C < high)


def _normal(alpha: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of a standard normal distribution its ``alpha``-quantile, D, and 1 / (f D), with f the density there."""
    quantile = torch.special.ndtri(alpha)
    density = (-quantile.square() / 2).exp() / math.sqrt(2 * math.pi)
    deviation = density / (1 - alpha)
    return quantile, deviation, 1 / (density * deviation)
