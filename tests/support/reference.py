"""What batch normalization over a joined batch is, in fp64 and from the formulas alone.

Plain differentiable operations: gradients of any order come from autograd. Nothing here uses torch's own batch norm or
anything of distnorm, so it can judge both.

Shape legend: N batch, C channel, S all other dimensions; x_NCS.
"""

from __future__ import annotations

from collections.abc import Sequence
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
