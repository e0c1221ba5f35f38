"""Generalized batch normalization: a statistic S and a deviation D instead of the mean and the standard deviation.

    y = (x - S) / sqrt(D^2 + eps) * weight + bias

Each class is one pair, in which D(x) = min_c E(x - c) for an error measure E and S is where the minimum is. S moves
with x and D does not, and both scale with x. So ``sum dx = 0`` and, for a small eps, ``sum x dx = 0``, as in batch
norm. Shared per channel forward, in float64; backward, two cotangents for each row that is not a count:

    class             S                 D                           rows                          collectives
    BatchNorm         mean              sqrt(mean (x - mean)^2)     x, x^2                        1
    L1                mean              mean |x - mean|             x; then |x - mean|            2
    Semideviation     mean              sqrt(mean [x - mean]+^2)    x; then [x - mean]+^2         2
    Range             (max + min) / 2   (max - min) / 2             max, -min, and their ties     1
    WorstCase         max               max - mean                  max and its ties; x           2
    MAD               median            mean |x - median|           x, x^2, x over C, x > C       1
    SQD               alpha-quantile    CVaR_alpha - mean           as MAD                        1

Evaluation is batch norm's, with S in ``running_mean`` and D^2 in ``running_var``: it can be folded.

Yuan, Feng, Norton & Li, "Generalized Batch Normalization: Towards Accelerating Deep Neural Networks", AAAI 2019.
RECONSTRUCTION: the paper's abstract and reviews name the pairs' origin (the risk quadrangle of Rockafellar & Uryasev,
2013) and recommend SQD before a ReLU; the other pairs, eps inside the root and the running statistics are ours. The
paper does not share across ranks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, final

import torch
from torch import Tensor

from distnorm.methods.base import (
    Layer,
    Method,
    Share,
    Shared,
    batch_norm_folded,
    compute_dtype,
    per_channel,
)
from distnorm.methods.batch_norm import BatchNorm
from distnorm.types import Link

_STOCK = BatchNorm()


class Deviation(Method):
    """A pair of a statistic S and a deviation D: subclasses say how both are shared."""

    @abstractmethod
    def share_pair(self, x_NCL: Tensor, share: Share, layer: Layer) -> Tensor:
        """Return ``(S, log(D^2 + eps) / 2)`` of ``x_NCL``, ``[2, C]``, equal on all sharing ranks."""

    @abstractmethod
    def pair(self, shared: Mapping[str, Shared], layer: Layer) -> tuple[Tensor, Tensor]:
        """Return S and D of shared means."""

    @property
    def follows(self) -> bool:
        """Return false: S and D are those of the batch."""
        return False

    def normalize(self, x_NCL: Tensor, share: Share, layer: Layer, *inputs: Tensor) -> Tensor:
        """Centre by S and divide by ``sqrt(D^2 + eps)``."""
        values_NCL = x_NCL.to(compute_dtype(x_NCL.dtype))
        statistic_C, log_scale_C = self.share_pair(values_NCL, share, layer).unbind()
        weight_C, bias_C = layer.parameters["weight"], layer.parameters["bias"]
        scale_C = torch.exp(-log_scale_C)
        scale_C = scale_C if weight_C is None else scale_C * weight_C
        y_NCL = centred(values_NCL, statistic_C) * per_channel(scale_C, x_NCL)
        return (y_NCL if bias_C is None else y_NCL + per_channel(bias_C, x_NCL)).to(x_NCL.dtype)

    def targets(self, shared: Mapping[str, Shared], layer: Layer) -> Mapping[str, Tensor]:
        """Return S for ``running_mean``, D^2 for ``running_var``."""
        statistic_C, deviation_C = self.pair(shared, layer)
        return {"running_mean": statistic_C, "running_var": deviation_C.square()}

    def evaluate(self, x_NCL: Tensor, layer: Layer, *inputs: Tensor) -> Tensor:
        """Return ``(x - S) / sqrt(D^2 + eps) * weight + bias`` with the running S and D."""
        return _STOCK.evaluate(x_NCL, layer)

    def folded(self, layer: Layer) -> tuple[Tensor, Tensor] | None:
        """Return scale and shift of evaluation."""
        return batch_norm_folded(layer)


@final
@dataclass(frozen=True, kw_only=True)
class L1(Deviation):
    """S is the mean, D the mean distance from it. Wu et al., "L1-Norm Batch Normalization", 2018, has this pair too."""

    def share_pair(self, x_NCL: Tensor, share: Share, layer: Layer) -> Tensor:
        """Share the mean, then the distances from it."""
        return _about_the_mean(x_NCL, share, torch.abs, partial(log_scale, eps=layer.eps))

    def pair(self, shared: Mapping[str, Shared], layer: Layer) -> tuple[Tensor, Tensor]:
        """Return the mean, and the mean distance."""
        return shared["mean"].means, shared["deviation"].means


@final
@dataclass(frozen=True, kw_only=True)
class Semideviation(Deviation):
    """S is the mean, D the root of the mean square of what exceeds it (the upper semideviation)."""

    def share_pair(self, x_NCL: Tensor, share: Share, layer: Layer) -> Tensor:
        """Share the mean, then the squares of what exceeds it."""
        return _about_the_mean(x_NCL, share, _upper_square, lambda square_C: (square_C + layer.eps).log() / 2)

    def pair(self, shared: Mapping[str, Shared], layer: Layer) -> tuple[Tensor, Tensor]:
        """Return the mean, and the root of the mean square."""
        return shared["mean"].means, shared["deviation"].means.sqrt()


@final
@dataclass(frozen=True, kw_only=True)
class Range(Deviation):
    """S is the middle of the range, D half of its width. Needs an exact policy: maxima have no mean over steps."""

    needs_max: ClassVar[bool] = True

    def share_pair(self, x_NCL: Tensor, share: Share, layer: Layer) -> Tensor:
        """Share the maxima of x and of -x."""

        def link(largest_2C: Tensor) -> Tensor:
            statistic_C, deviation_C = _middle(largest_2C)
            return torch.stack((statistic_C, log_scale(deviation_C, layer.eps)))

        (upper_C, upper_ties_C), (lower_C, lower_ties_C) = _largest(x_NCL), _largest(-x_NCL)
        ties_2C = torch.stack((upper_ties_C, lower_ties_C))
        return share(torch.stack((upper_C, lower_C)), ties_2C, link, op="max")[0]

    def pair(self, shared: Mapping[str, Shared], layer: Layer) -> tuple[Tensor, Tensor]:
        """Return the middle and half of the width."""
        return _middle(shared[""].means)


@final
@dataclass(frozen=True, kw_only=True)
class WorstCase(Deviation):
    """S is the maximum, D its distance from the mean. Needs an exact policy, as ``Range``."""

    needs_max: ClassVar[bool] = True

    def share_pair(self, x_NCL: Tensor, share: Share, layer: Layer) -> Tensor:
        """Share the maximum, then the mean."""
        largest_C, _ = share(*_largest(x_NCL), name="max", op="max")
        mean_C, _ = share(channel_sum(x_NCL), values_per_channel(x_NCL), name="mean")
        return torch.stack((largest_C, log_scale(largest_C - mean_C, layer.eps)))

    def pair(self, shared: Mapping[str, Shared], layer: Layer) -> tuple[Tensor, Tensor]:
        """Return the maximum, and its distance from the mean."""
        return shared["max"].means, shared["max"].means - shared["mean"].means


def centred(x_NCL: Tensor, centre_C: Tensor) -> Tensor:
    """Return ``x - centre`` with a float64 centre: what its rounding loses is subtracted too."""
    rounded_C = centre_C.detach().to(x_NCL.dtype)
    return x_NCL - per_channel(rounded_C, x_NCL) - per_channel(centre_C - rounded_C, x_NCL)


def channel_sum(x_NCL: Tensor) -> Tensor:
    """Return the sum of each channel, float64."""
    return x_NCL.sum([dim for dim in range(x_NCL.dim()) if dim != 1], dtype=torch.float64)


def values_per_channel(x_NCL: Tensor) -> int:
    """Return the number of values in each channel."""
    return x_NCL.numel() // x_NCL.shape[1]


def _about_the_mean(x_NCL: Tensor, share: Share, measure: Callable[[Tensor], Tensor], link: Link) -> Tensor:
    count = values_per_channel(x_NCL)
    mean_C, _ = share(channel_sum(x_NCL), count, name="mean")
    log_scale_C, _ = share(channel_sum(measure(centred(x_NCL, mean_C))), count, link, name="deviation")
    return torch.stack((mean_C, log_scale_C))


def _upper_square(x_NCL: Tensor) -> Tensor:
    return x_NCL.relu().square()


def _largest(x_NCL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maximum of each channel, and how many values attain it, float64; minus infinity without values."""
    dims = [dim for dim in range(x_NCL.dim()) if dim != 1]
    if not values_per_channel(x_NCL):
        none_C = channel_sum(x_NCL)
        return none_C - torch.inf, none_C.detach()
    largest_C = x_NCL.amax(dims)
    return largest_C.double(), (x_NCL == per_channel(largest_C, x_NCL)).sum(dims, dtype=torch.float64)


def _middle(largest_2C: Tensor) -> tuple[Tensor, Tensor]:
    upper_C, lower_C = largest_2C.unbind()
    return (upper_C - lower_C) / 2, (upper_C + lower_C) / 2


def log_scale(deviation_C: Tensor, eps: float) -> Tensor:
    """Return ``log(D^2 + eps) / 2``, a coordinate in which old cotangents keep their meaning."""
    return (deviation_C.square() + eps).log() / 2
