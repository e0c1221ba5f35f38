"""What batch normalization, and what is like it, over a joined batch is, in fp64 and from the formulas alone.

Plain differentiable operations: gradients of any order come from autograd. Nothing here uses torch's own batch norm or
anything of distnorm, so it can judge both.

Shape legend: N batch, C channel, S all other dimensions; x_NCS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor


class Normalized(NamedTuple):
    """The outputs, one per rank, and the running statistics after the step."""

    outputs: list[Tensor]
    running_mean: Tensor
    running_var: Tensor


def batch_norm(
    inputs: Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    momentum: float = 0.1,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> Normalized:
    """Normalize the joined batch of all ranks: y = weight * (x - mean) / sqrt(var + eps) + bias.

    The biased variance normalizes, the unbiased one enters ``running_var``.

    Args:
        inputs: One (N_k, C, ...) tensor per rank; N_k may differ and may be 0.
        weight: Per-channel scale, 1 if None.
        bias: Per-channel shift, 0 if None.
        eps: Added to the variance.
        momentum: Weight of this batch in the running statistics.
        running_mean: Running mean before the step, zeros if None.
        running_var: Running variance before the step, ones if None.

    Returns:
        Outputs split as the inputs were, and new running statistics; all in fp64.
    """
    x_NCS = _joined(inputs)
    count = _count(x_NCS)
    if count < 2:
        raise ValueError(f"{count} value per channel over all ranks; the unbiased variance needs at least 2")
    mean_C = _channel_sum(x_NCS) / count
    centred_NCS = x_NCS - _wide(mean_C, x_NCS)
    var_C = _channel_sum(centred_NCS**2) / count
    y_NCS = _affine(centred_NCS / _wide(var_C + eps, x_NCS).sqrt(), weight, bias)
    return Normalized(
        _split(y_NCS, inputs),
        _running(running_mean, 0.0, mean_C, momentum),
        _running(running_var, 1.0, var_C * count / (count - 1), momentum),
    )


def rms_norm(
    inputs: Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    momentum: float = 0.1,
    running_var: Tensor | None = None,
) -> Normalized:
    """Divide by the root of the second moment: y = weight * x / sqrt(mean(x^2) + eps) + bias.

    ``running_var`` tracks mean(x^2) as it is, without Bessel's correction; ``running_mean`` stays 0. Arguments and
    result are those of `batch_norm`.
    """
    x_NCS = _joined(inputs)
    count = _count(x_NCS)
    if count < 1:
        raise ValueError("no value in any rank's input")
    moment_C = _channel_sum(x_NCS**2) / count
    y_NCS = _affine(x_NCS / _wide(moment_C + eps, x_NCS).sqrt(), weight, bias)
    return Normalized(
        _split(y_NCS, inputs),
        torch.zeros_like(moment_C).detach(),
        _running(running_var, 1.0, moment_C, momentum),
    )


# --- pairs of a statistic and a deviation: channels of sorted or unsorted values ``[M]`` to (S, D) ----

Pair = Callable[[Tensor], tuple[Tensor, Tensor]]


def sd(x_M: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation."""
    return x_M.mean(), (x_M - x_M.mean()).square().mean().sqrt()


def mad(x_M: Tensor) -> tuple[Tensor, Tensor]:
    """Median, the lower one of an even number, and the mean distance from it."""
    median = x_M.sort().values[(len(x_M) + 1) // 2 - 1]
    return median, (x_M - median).abs().mean()


def l1(x_M: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and the mean distance from it."""
    return x_M.mean(), (x_M - x_M.mean()).abs().mean()


def value_range(x_M: Tensor) -> tuple[Tensor, Tensor]:
    """The middle of the range and half of its width; what several values attain is the mean of them."""
    largest, least = x_M[x_M == x_M.max()].mean(), x_M[x_M == x_M.min()].mean()
    return (largest + least) / 2, (largest - least) / 2


def worst_case(x_M: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum and its distance from the mean."""
    largest = x_M[x_M == x_M.max()].mean()
    return largest, largest - x_M.mean()


def superquantile(alpha: float) -> Pair:
    """The quantile, and the distance from the mean of all to that of the largest ``(1 - alpha) M``, in parts of one."""

    def pair(x_M: Tensor) -> tuple[Tensor, Tensor]:
        count = len(x_M)
        at = math.ceil(round(alpha * count, 9))
        sorted_M = x_M.sort().values
        largest = (1 - alpha) * count
        superquantile = (sorted_M[at:].sum() + (largest - (count - at)) * sorted_M[at - 1]) / largest
        return sorted_M[at - 1], superquantile - x_M.mean()

    return pair


def semideviation(x_M: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and the root of the mean square of what is above it."""
    above_M = (x_M - x_M.mean()) * (x_M > x_M.mean())
    return x_M.mean(), above_M.square().mean().sqrt()


def normal_pair(alpha: float) -> Pair:
    """Quantile and superquantile deviation of a normal distribution with the mean and variance of the values."""
    normal = NormalDist()
    place = normal.inv_cdf(alpha)

    def pair(x_M: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = sd(x_M)
        return mean + place * std, normal.pdf(place) / (1 - alpha) * std

    return pair


def above_threshold(alpha: float, threshold: float, position: float) -> Pair:
    """Superquantile deviation by a fixed threshold: D solves D = u / (1 - alpha) + (1 - r) S - mean, S = mean + t D."""

    def pair(x_M: Tensor) -> tuple[Tensor, Tensor]:
        above_M = x_M > threshold
        ratio = float(above_M.double().mean()) / (1 - alpha)
        upper = (x_M * above_M).mean() / (1 - alpha)
        deviation = (upper - ratio * x_M.mean()) / (1 - (1 - ratio) * position)
        return x_M.mean() + position * deviation, deviation

    return pair


def generalized(
    inputs: Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    pair: Pair | Sequence[Pair],
    eps: float = 1e-5,
    momentum: float = 0.1,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
) -> Normalized:
    """Generalized batch norm: y = weight * (x - S) / sqrt(D^2 + eps) + bias, for the ``pair`` (S, D) of each channel.

    S enters ``running_mean`` and D^2 ``running_var``. Other arguments and the result are those of `batch_norm`.
    """
    x_NCS = _joined(inputs)
    pairs = [pair] * x_NCS.shape[1] if callable(pair) else pair
    found = [each(x_NCS[:, channel].flatten()) for channel, each in enumerate(pairs)]
    statistic_C, deviation_C = (torch.stack(each) for each in zip(*found, strict=True))
    y_NCS = (x_NCS - _wide(statistic_C, x_NCS)) / _wide(deviation_C.square() + eps, x_NCS).sqrt()
    return Normalized(
        _split(_affine(y_NCS, weight, bias), inputs),
        _running(running_mean, 0.0, statistic_C, momentum),
        _running(running_var, 1.0, deviation_C.square(), momentum),
    )


def instance_enhancement(
    inputs: Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    gate_weight: Tensor | float = 0.0,
    gate_bias: Tensor | float = -1.0,
    eps: float = 1e-5,
) -> Normalized:
    """IEBN: batch norm with weight * sigmoid(gate_weight * mean over S of x + gate_bias) as its weight."""
    found = batch_norm(inputs, eps=eps)
    outputs = []
    for x, normalized in zip(inputs, found.outputs, strict=True):
        x_NCS = x.double()
        pooled_NC = x_NCS.flatten(2).mean(2) if x_NCS.dim() > 2 else x_NCS
        gate_NC = 1 / (1 + (-(gate_weight * pooled_NC + gate_bias)).exp())
        scaled_NCS = normalized * gate_NC.reshape(*gate_NC.shape, *[1] * (x_NCS.dim() - 2))
        outputs.append(_affine(scaled_NCS, weight, bias))
    return found._replace(outputs=outputs)


class MixtureState(NamedTuple):
    """Weights [K], means [K, C] and variances [K, C]."""

    weights: Tensor
    means: Tensor
    variances: Tensor


def mixture_step(x_PC: Tensor, state: MixtureState, eps: float) -> tuple[Tensor, MixtureState]:
    """One round of EM for samples ``[P, C]``: responsibilities ``[P, K]`` under ``state``, and their mixture."""
    weights = state.weights.clamp_min(0.01 / len(state.weights))
    joint_PK = torch.stack(
        [
            weight * torch.exp(-((x_PC - mean) ** 2 / (var + eps) + (var + eps).log()).sum(1) / 2)
            for weight, mean, var in zip(weights, state.means, state.variances, strict=True)
        ],
        1,
    )
    belongs_PK = joint_PK / joint_PK.sum(1, keepdim=True)
    return belongs_PK, mixture_of(x_PC, belongs_PK)


def mixture_of(x_PC: Tensor, belongs_PK: Tensor) -> MixtureState:
    """The mixture of samples that belong to components by these parts."""
    counts = belongs_PK.sum(0)
    means = torch.stack([(part[:, None] * x_PC).sum(0) / part.sum() for part in belongs_PK.t()])
    rows = zip(belongs_PK.t(), means, strict=True)
    variances = torch.stack([(part[:, None] * (x_PC - mean) ** 2).sum(0) / part.sum() for part, mean in rows])
    return MixtureState(counts / len(x_PC), means, variances)


def mixture_output(x_PC: Tensor, belongs_PK: Tensor, state: MixtureState, eps: float) -> Tensor:
    """sum_k r_k / sqrt(K l_k) * (x - m_k) / sqrt(v_k + eps)."""
    components = len(state.weights)
    rows = zip(belongs_PK.t(), *state, strict=True)
    return torch.stack(
        [
            part[:, None] / (components * weight) ** 0.5 * (x_PC - mean) / (var + eps).sqrt()
            for part, weight, mean, var in rows
        ]
    ).sum(0)


def first_mixture(
    inputs: Sequence[Tensor], weight: Tensor | None = None, bias: Tensor | None = None, *, components: int = 2
) -> Normalized:
    """The first step of a mixture whose components are equal: each gets the same part of every sample."""
    x_NCS = _joined(inputs)
    x_PC = x_NCS.movedim(1, -1).reshape(-1, x_NCS.shape[1])
    belongs_PK = torch.full((len(x_PC), components), 1 / components, dtype=torch.float64)
    y_PC = mixture_output(x_PC, belongs_PK, mixture_of(x_PC, belongs_PK), 1e-5)
    y_NCS = y_PC.reshape(*x_NCS.movedim(1, -1).shape).movedim(-1, 1)
    return batch_norm(inputs)._replace(outputs=_split(_affine(y_NCS, weight, bias), inputs))


def group_norm(
    inputs: Sequence[Tensor],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    groups: int | None = None,
    eps: float = 1e-5,
) -> Normalized:
    """Normalize ``groups`` of channels of every sample; None: each channel. Running statistics stay as they were."""
    outputs = []
    for x in inputs:
        x_NCS = x.double()
        x_NGM = x_NCS.reshape(len(x), groups or x.shape[1], x[:1].numel() // (groups or x.shape[1]) if len(x) else 0)
        centred = x_NGM - x_NGM.mean(2, keepdim=True)
        normalized = centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()
        outputs.append(_affine(normalized.reshape(x_NCS.shape), weight, bias))
    features = inputs[0].shape[1]
    return Normalized(outputs, torch.zeros(features).double(), torch.ones(features).double())


def _joined(inputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.double() for x in inputs])


def _count(x_NCS: Tensor) -> int:
    return x_NCS[:, 0].numel()


def _channel_sum(x_NCS: Tensor) -> Tensor:
    return x_NCS.sum([dim for dim in range(x_NCS.dim()) if dim != 1])


def _wide(values_C: Tensor, x_NCS: Tensor) -> Tensor:
    return values_C.reshape(1, -1, *[1] * (x_NCS.dim() - 2))


def _affine(x_NCS: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x_NCS = x_NCS * _wide(weight.double(), x_NCS)
    if bias is not None:
        x_NCS = x_NCS + _wide(bias.double(), x_NCS)
    return x_NCS


def _split(y_NCS: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    return list(y_NCS.split([len(x) for x in inputs]))


def _running(before_C: Tensor | None, start: float, now_C: Tensor, momentum: float) -> Tensor:
    old_C = torch.full_like(now_C, start) if before_C is None else before_C.double()
    return ((1 - momentum) * old_C + momentum * now_C).detach()
