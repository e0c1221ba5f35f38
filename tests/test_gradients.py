"""Derivatives of methods that are written out are what autograd finds; the others are autograd's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from distnorm.kernels import gradients
from distnorm.methods import RMS, BatchNorm, ChannelAffine
from distnorm.types import Affine

EPS = 1e-3


@dataclass(frozen=True, kw_only=True)
class Tilted(ChannelAffine):
    """No formula has its name, and its bias does not enter."""

    raw: ClassVar[slice] = slice(0, 2)

    def link(self, means_KC: Tensor, eps: float) -> Tensor:
        return torch.stack((means_KC[0] * means_KC[1], (means_KC[1] + eps).sqrt()))

    def coefficients(self, theta_KC: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
        scale_C = theta_KC[0].sin() if affine.weight_C is None else theta_KC[0].sin() * affine.weight_C
        return scale_C, theta_KC[1] * scale_C

    def moments(self, means_KC: Tensor, count: Tensor) -> dict[str, Tensor]:
        return {"running_var": means_KC[1]}


METHODS = [BatchNorm(), RMS(), RMS(clip=1.2, clip_after=0), Tilted()]


def numbers(rows: int) -> Tensor:
    return torch.rand(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(rows)) + 0.5


@pytest.mark.parametrize("present", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_gradients_of_coefficients(method: ChannelAffine, present: tuple[bool, bool]) -> None:
    theta, (dscale, dshift) = numbers(method.kinds), numbers(7)[:2]
    weight, bias = (each if there else None for each, there in zip(numbers(4)[:2], present, strict=True))
    affine = Affine(weight, bias, EPS, numbers(3)[0].float(), torch.tensor(3))
    found = gradients.pull(method, theta, affine, dscale, dshift)

    leaves = [None if each is None else each.clone().requires_grad_() for each in (theta, weight, bias)]
    scale, shift = method.coefficients(leaves[0], affine._replace(weight_C=leaves[1], bias_C=leaves[2]))
    given = [each for each in leaves if each is not None]
    loss = (scale * dscale).sum() + (shift * dshift).sum()
    wanted = iter(torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True))
    for ours, leaf in zip(found, leaves, strict=True):
        if leaf is not None:
            torch.testing.assert_close(ours, next(wanted))


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_gradients_of_the_link(method: ChannelAffine) -> None:
    means, theta_grad = numbers(method.kinds).square(), numbers(6)[: method.kinds]
    if method.kinds == 2:
        means[1] += means[0].square()  # a variance above 0
    leaf = means.clone().requires_grad_()
    theta = method.link(leaf, EPS)
    (wanted,) = torch.autograd.grad(theta, leaf, theta_grad)
    torch.testing.assert_close(gradients.pull_link(method, means, theta.detach(), theta_grad, EPS), wanted)


def test_every_formula_is_written_out() -> None:
    assert {method.formula().name for method in METHODS[:2]} == set(gradients.WRITTEN)
