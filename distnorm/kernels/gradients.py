"""Derivatives of the methods' C-sized arithmetic: from a formula if it has them in closed form, else from autograd.

The closed form avoids building a graph in every step; ``arithmetic.c`` and ``gpu/formulas.py`` contain the same.
Shapes: means_KC, theta_KC and their gradients of K kinds; factor_C, the scale without the weight; all float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distnorm.kernels.arithmetic import PerChannel
from distnorm.types import Affine

Pulled = tuple[Tensor, Tensor | None, Tensor | None]
"""Gradients for theta_KC, weight_C and bias_C."""


class Written(NamedTuple):
    """The derivatives of one formula: of ``coefficients``, given factor_C, and of ``link``."""

    pull: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    """From theta_KC, factor_C and the gradients of scale and shift to that of theta_KC, before the weight, and of the
    weight."""

    pull_link: Callable[[Tensor, Tensor], Tensor]
    """Compute the gradient of means_KC from theta_KC and its gradient."""


def pull(method: PerChannel, theta_KC: Tensor, affine: Affine, scale_grad_C: Tensor, shift_grad_C: Tensor) -> Pulled:
    """Return gradients for theta_KC, weight_C and bias_C, given those for ``coefficients``."""
    written = _written(method)
    if written is None:
        return _pull_by_autograd(method, theta_KC, affine, scale_grad_C, shift_grad_C)
    factor_C, _ = method.coefficients(theta_KC, affine._replace(weight_C=None, bias_C=None))
    theta_grad_KC, weight_grad_C = written.pull(theta_KC, factor_C, scale_grad_C, shift_grad_C)
    theta_grad_KC = theta_grad_KC if affine.weight_C is None else theta_grad_KC * affine.weight_C
    return theta_grad_KC, weight_grad_C, shift_grad_C


def pull_link(method: PerChannel, means_KC: Tensor, theta_KC: Tensor, theta_grad_KC: Tensor, eps: float) -> Tensor:
    """Return the gradient for means_KC, given that for ``theta_KC = link(means_KC)``."""
    written = _written(method)
    if written is not None:
        return written.pull_link(theta_KC, theta_grad_KC)
    leaf_KC = means_KC.detach().requires_grad_()
    with torch.enable_grad():
        out_KC = method.link(leaf_KC, eps)
    return torch.autograd.grad(out_KC, leaf_KC, theta_grad_KC)[0]


def _written(method: PerChannel) -> Written | None:
    formula = method.formula()
    return None if formula is None else WRITTEN.get(formula.name)


def _pull_by_autograd(
    method: PerChannel, theta_KC: Tensor, affine: Affine, scale_grad_C: Tensor, shift_grad_C: Tensor
) -> Pulled:
    leaves = [None if each is None else each.detach().requires_grad_() for each in (theta_KC, *affine[:2])]
    theta_KC_, weight_C, bias_C = leaves
    assert theta_KC_ is not None
    with torch.enable_grad():
        both = method.coefficients(theta_KC_, affine._replace(weight_C=weight_C, bias_C=bias_C))
    pairs = [(out, grad) for out, grad in zip(both, (scale_grad_C, shift_grad_C), strict=True) if out.requires_grad]
    outputs, grads = zip(*pairs, strict=True)
    given = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(outputs, given, grads, allow_unused=True, materialize_grads=True))
    theta_grad_KC, weight_grad_C, bias_grad_C = (None if leaf is None else next(found) for leaf in leaves)
    assert theta_grad_KC is not None
    return theta_grad_KC, weight_grad_C, bias_grad_C


def _pull_batch_norm(
    theta_KC: Tensor, factor_C: Tensor, scale_grad_C: Tensor, shift_grad_C: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute ``d mean = -scale dshift``, ``d log_std = -scale (dscale - mean dshift)``."""
    centred_C = scale_grad_C - theta_KC[0] * shift_grad_C
    return torch.stack((-factor_C * shift_grad_C, -factor_C * centred_C)), factor_C * centred_C


def _pull_link_batch_norm(theta_KC: Tensor, theta_grad_KC: Tensor) -> Tensor:
    """Compute ``d square = d log_std / (2 (var + eps))``, ``d mean' = d mean - 2 mean d square``."""
    mean_C, log_std_C = theta_KC.unbind()
    mean_grad_C, log_std_grad_C = theta_grad_KC.unbind()
    square_grad_C = torch.exp(-2 * log_std_C).mul_(log_std_grad_C).div_(2)
    return torch.stack((torch.addcmul(mean_grad_C, mean_C, square_grad_C, value=-2), square_grad_C))


def _pull_rms(theta_KC: Tensor, factor_C: Tensor, scale_grad_C: Tensor, shift_grad_C: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``d log_rms = -scale dscale``; a correction is a constant."""
    weight_grad_C = factor_C * scale_grad_C
    return -weight_grad_C[None], weight_grad_C


def _pull_link_rms(theta_KC: Tensor, theta_grad_KC: Tensor) -> Tensor:
    """Compute ``d square = d log_rms / (2 (mean(x^2) + eps))``."""
    return torch.exp(-2 * theta_KC).mul_(theta_grad_KC).div_(2)


WRITTEN = {
    "batch_norm": Written(_pull_batch_norm, _pull_link_batch_norm),
    "rms": Written(_pull_rms, _pull_link_rms),
}
"""The closed forms by the name of the formula."""
