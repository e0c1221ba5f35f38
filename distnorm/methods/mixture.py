"""Mixture normalization: each sample is normalized by the components of a Gaussian mixture to which it belongs.

The samples are the C-vectors x_i at all positions of all images. A mixture of K Gaussians with weights l_k, means m_k
and diagonal variances v_k gives them to its components by

    r_ik = l_k N(x_i; m_k, v_k) / sum_j l_j N(x_i; m_j, v_j)
    y_i = sum_k r_ik / sqrt(K l_k) * (x_i - m_k) / sqrt(v_k + eps) * weight + bias

with l_k = mean r_ik, m_k = sum r_ik x_i / sum r_ik, v_k = sum r_ik (x_i - m_k)^2 / sum r_ik over the batches of all
ranks: EM rounds, each of which shares K (2 C + 1) sums and a count forward, as many cotangents backward. The first
round begins with the running mixture, so that components stay in their places; the last one's r_ik normalize. Gradients
pass through all rounds, and are exact where the running mixture is constant. ``rounds=1`` is online EM.

The running mixture averages l_k, l_k m_k and l_k v_k. Before it has any value, all components are equal, and the layer
is batch norm: in its first training step, and in evaluation. That step places the means at quantiles of a normal
distribution with the batch's mean and variance. A component that loses its samples keeps its place, and competes with
at least a hundredth of the usual weight. Evaluation uses the running mixture; r_ik depend on x, so it cannot be folded.

Kalayeh & Shah, "Training Faster by Separating Modes of Variation in Batch-normalized Models", TPAMI 2019.
RECONSTRUCTION: the formula of y is the paper's, except for the factor 1 / sqrt(K). The paper's output has a variance of
up to K, this one of up to 1, which it has where components are far apart or equal. The paper fits every batch anew by
k-means++ and EM; the warm start, the gradient and the running mixture are ours, as is sharing across ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor

from distnorm.methods.base import Declared, Layer, Method, Share, Shared, compute_dtype, per_channel
from distnorm.validation import Components, Rounds, check_fields

_LOST = 1e-6
"""The part of the samples below which a component keeps its place."""
_TINY = 1e-30


class Mixture(NamedTuple):
    """A Gaussian mixture: weights ``[K]``, means and variances ``[K, C]``, float64."""

    weight_K: Tensor
    mean_KC: Tensor
    var_KC: Tensor

    @classmethod
    def of(cls, means_2KC: Tensor, counts_K1: Tensor) -> Mixture:
        """Return the mixture with these means of x and x^2, and so many samples per component."""
        mean_KC, square_KC = means_2KC.unbind()
        weight_K = counts_K1[:, 0] / counts_K1.sum().clamp_min(1)
        return cls(weight_K, mean_KC, (square_KC - mean_KC.square()).clamp_min(0))

    def where(self, condition: Tensor, other: Mixture) -> Mixture:
        """Return this mixture where the condition holds, a scalar or one value per component, else the ``other``."""
        wide = condition[..., None]
        pairs = zip((condition, wide, wide), self, other, strict=True)
        return Mixture(*(torch.where(each, one, two) for each, one, two in pairs))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance ``[C]`` of the mixture."""
        weight_K1 = self.weight_K[:, None]
        mean_C = (weight_K1 * self.mean_KC).sum(0)
        return mean_C, (weight_K1 * (self.var_KC + (self.mean_KC - mean_C).square())).sum(0)

    def spread(self) -> Mixture:
        """Return components at quantiles of a normal distribution with the same mean and variance."""
        components = len(self.weight_K)
        part_K = torch.arange(components, device=self.weight_K.device, dtype=self.weight_K.dtype)
        place_K1 = torch.special.ndtri((part_K[:, None] + 0.5) / components)
        mean_C, var_C = self.moments()
        inside_C = var_C * (1 - place_K1.square().mean())
        return Mixture(
            torch.full_like(self.weight_K, 1 / components),
            mean_C + place_K1 * var_C.clamp_min(_TINY).sqrt(),
            inside_C.expand_as(self.mean_KC),
        )


@final
@dataclass(frozen=True, kw_only=True)
class MixtureNorm(Method):
    """Normalize by the components of a mixture; with one component, this is batch norm.

    Args:
        components: their number K. A batch should have many more positions than components.
        rounds: rounds of EM per forward pass, each of them one collective.
    """

    components: Components = 3
    rounds: Rounds = 2

    def __post_init__(self) -> None:
        """Validate."""
        check_fields(self)

    def declare(self, features: int) -> Declared:
        """Declare the running mixture, without any value yet."""
        shape = self.components, features
        return Declared(
            buffers={
                "component_weight": torch.zeros(self.components),
                "component_mean": torch.zeros(shape),
                "component_var": torch.zeros(shape),
            }
        )

    def normalize(self, x_NCL: Tensor, share: Share, layer: Layer, *inputs: Tensor) -> Tensor:
        """Fit the mixture by EM rounds, and normalize by the last one."""
        with torch.autocast(x_NCL.device.type, enabled=False):
            samples = _Samples(x_NCL, layer)
            mixture, fresh = self._running(layer)
            belongs_NKP = samples.belonging(mixture, fresh)
            for number in range(self.rounds):
                if number:
                    mixture = mixture.spread().where(fresh, mixture) if number == 1 else mixture
                    belongs_NKP = samples.belonging(mixture)
                mixture = Mixture.of(*share(*samples.sums(belongs_NKP), name=_round(number)))
            return samples.normalized(belongs_NKP, mixture)

    def evaluate(self, x_NCL: Tensor, layer: Layer, *inputs: Tensor) -> Tensor:
        """Normalize by the running mixture, or as batch norm while it has no value."""
        with torch.autocast(x_NCL.device.type, enabled=False):
            samples = _Samples(x_NCL, layer)
            mixture, fresh = self._running(layer)
            return samples.normalized(samples.belonging(mixture, fresh), mixture)

    def targets(self, shared: Mapping[str, Shared], layer: Layer) -> Mapping[str, Tensor]:
        """Return the mixture of the last round, and the mean and unbiased variance of all samples."""
        last = shared[_round(self.rounds - 1)]
        fitted, (before, fresh) = Mixture.of(*last), self._running(layer)
        mean_C, var_C = fitted.moments()
        count = last.weight.sum()
        lost_K = (fitted.weight_K < _LOST) & ~fresh
        kept = before._replace(weight_K=torch.full_like(before.weight_K, _LOST)).where(lost_K, fitted)
        found = fitted.spread().where(fresh, kept) if self.rounds == 1 else kept
        weight_K1 = found.weight_K[:, None]
        return {
            "running_mean": mean_C,
            "running_var": var_C * (count / (count - 1).clamp_min(1)),
            "component_weight": found.weight_K,
            "component_mean": weight_K1 * found.mean_KC,
            "component_var": weight_K1 * found.var_KC,
        }

    def _running(self, layer: Layer) -> tuple[Mixture, Tensor]:
        """Return the running mixture, and whether it has no value yet; if so, it is that of the running statistics."""
        weight_K, mean_KC, var_KC = (
            layer.declared(name).double() for name in ("component_weight", "component_mean", "component_var")
        )
        fresh = weight_K.sum() <= 0
        weight_K1 = weight_K[:, None].clamp_min(_TINY)
        running_C, running_var_C = layer.buffers["running_mean"], layer.buffers["running_var"]
        none_C = torch.zeros_like(mean_KC[0])
        stock = Mixture(
            torch.full_like(weight_K, 1 / self.components),
            (none_C if running_C is None else running_C.double()).expand_as(mean_KC),
            (none_C + 1 if running_var_C is None else running_var_C.double()).expand_as(var_KC),
        )
        known = Mixture(weight_K / weight_K.sum().clamp_min(_TINY), mean_KC / weight_K1, var_KC / weight_K1)
        return stock.where(fresh, known), fresh


def _round(number: int) -> str:
    return f"round {number + 1}"


class _Samples:
    """The C-vectors of an input, about their local mean: ``values_NCP``, N images of P positions."""

    def __init__(self, x_NCL: Tensor, layer: Layer) -> None:
        self.x_NCL, self.layer = x_NCL, layer
        wide_NCL = x_NCL.to(compute_dtype(x_NCL.dtype))
        whole_NCP = wide_NCL.flatten(2) if x_NCL.dim() > 2 else wide_NCL[..., None]
        pivot_C = whole_NCP.detach().sum((0, 2)) / max(1, whole_NCP.numel() // whole_NCP.shape[1])
        self.values_NCP = whole_NCP - pivot_C[:, None]
        self.pivot_C = pivot_C.double()

    def belonging(self, mixture: Mixture, fresh: Tensor | None = None) -> Tensor:
        """Return how much each sample belongs to each component, ``[N, K, P]``; equally if ``fresh``."""
        precision_KC = 1 / (mixture.var_KC + self.layer.eps)
        place_KC = mixture.mean_KC - self.pivot_C
        apart_NKP = self._weighted(precision_KC, self.values_NCP.square())
        apart_NKP = apart_NKP - 2 * self._weighted(precision_KC * place_KC, self.values_NCP)
        constant_KC = precision_KC * place_KC.square() - precision_KC.log()
        least = 0.01 / len(mixture.weight_K)
        logit_K = mixture.weight_K.clamp_min(least).log() - constant_KC.sum(1) / 2
        logits_NKP = logit_K.to(apart_NKP.dtype)[:, None] - apart_NKP / 2
        return (logits_NKP if fresh is None else torch.where(fresh, 0, logits_NKP)).softmax(1)

    def sums(self, belongs_NKP: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of x and of x^2 of each component, ``[2, K, C]``, and its number of samples, ``[K, 1]``."""
        values_NPC = self.values_NCP.transpose(1, 2)
        count_K1 = belongs_NKP.sum((0, 2), dtype=torch.float64)[:, None]
        sum_KC = (belongs_NKP @ values_NPC).sum(0, dtype=torch.float64)
        square_KC = (belongs_NKP @ values_NPC.square()).sum(0, dtype=torch.float64)
        pivot_C = self.pivot_C
        square_KC = square_KC + 2 * pivot_C * sum_KC + pivot_C.square() * count_K1
        return torch.stack((sum_KC + pivot_C * count_K1, square_KC)), count_K1

    def normalized(self, belongs_NKP: Tensor, mixture: Mixture) -> Tensor:
        """Return y, of the shape and dtype of the input."""
        scale_KC = (mixture.var_KC + self.layer.eps).rsqrt()
        part_K = (len(mixture.weight_K) * mixture.weight_K).clamp_min(_TINY).rsqrt()
        part_NKP = belongs_NKP * part_K.to(belongs_NKP.dtype)[:, None]
        shift_KC = (mixture.mean_KC - self.pivot_C) * scale_KC
        y_NCP = self.values_NCP * self._weighted(scale_KC.t(), part_NKP) - self._weighted(shift_KC.t(), part_NKP)
        y_NCL = y_NCP.view(self.x_NCL.shape)
        weight_C, bias_C = self.layer.parameters["weight"], self.layer.parameters["bias"]
        y_NCL = y_NCL if weight_C is None else y_NCL * per_channel(weight_C, self.x_NCL)
        return (y_NCL if bias_C is None else y_NCL + per_channel(bias_C, self.x_NCL)).to(self.x_NCL.dtype)

    @staticmethod
    def _weighted(weights: Tensor, values: Tensor) -> Tensor:
        # Not matmul, which rounds otherwise under no_grad (torch 2.13), as in the first forward of a checkpoint.
        return torch.bmm(weights.to(values.dtype).expand(len(values), -1, -1), values)
