"""Inputs of norms in any layout, what comes out of a kernel or a reference, and how far apart the two may be.

The law of accuracy in float32: an error is at most twice that of torch's own batch norm, or 8 units in the last place
of |x| / sigma, the relative precision to which a value's distance from the mean can be known at all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distnorm.autograd import normalize
from distnorm.autograd.keep_local import KeepLocal
from distnorm.methods import RMS, BatchNorm, ChannelAffine
from distnorm.methods.base import layer_of
from distnorm.types import Affine
from tests.support import reference

EPS = 1e-5
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
REFERENCES = {BatchNorm: reference.batch_norm, RMS: reference.rms_norm}
LAYOUTS = ("contiguous", "channels_last", "sliced", "transposed", "expanded")
MEANS = (0.0, 50.0, 1e4)
VALUES = ("normal", "rectified", "outlier", "constant")


class Case(NamedTuple):
    """What is drawn: everything else follows from it."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    mean: float = 0.0
    dtype: torch.dtype = torch.float32
    method: ChannelAffine = BatchNorm()
    values: str = "normal"
    seed: int = 0


class Result(NamedTuple):
    """The output and all gradients."""

    y: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor


def drawn(count: int, *dtypes: torch.dtype, methods: tuple[ChannelAffine, ...], most: int) -> list[Case]:
    """``count`` cases of at most ``most`` values, always the same ones: for machines without hypothesis."""
    generator, found = random.Random(0), list[Case]()
    while len(found) < count:
        space = [generator.randint(1, 5) for _ in range(generator.randint(0, 3))]
        shape = (generator.randint(1, 7), generator.randint(1, 5), *space)
        if 1 < torch.Size(shape).numel() // shape[1] and torch.Size(shape).numel() <= most:
            pick = generator.choice
            case = Case(shape, pick(LAYOUTS), pick(LAYOUTS), pick(MEANS), pick(dtypes), pick(methods), pick(VALUES))
            found.append(case._replace(seed=generator.randint(0, 99)))
    return found


# --- tensors of any layout -----------------------------------------------------------------------


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values, or those that the layout can hold, in another layout."""
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "sliced":
        return torch.stack((values, values - 1), -1)[..., 0]
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":  # all samples are the first one; the stride is zero
        return values[:1].expand_as(values)
    return values


def numbers(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, dy, weight and bias."""
    generator = torch.Generator().manual_seed(case.seed)
    x, dy = (torch.randn(case.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if case.values == "rectified":
        x = x.relu()
    elif case.values == "outlier":  # the first sample, which is what the kernels centre about
        x[0] += 30
    elif case.values == "constant":
        x[:] = 0.1
    affine = torch.rand(2, case.shape[1], generator=generator) + 0.5
    wide = torch.float64 if case.dtype is torch.float64 else torch.float32
    x, dy = ((x + case.mean).to(case.dtype), dy.to(case.dtype))
    return laid_out(x, case.layout), laid_out(dy, case.dy_layout), affine[0].to(wide), affine[1].to(wide)


def evaluate(function: Function, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> Result:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    y = function(*leaves)
    return Result(y.detach(), *torch.autograd.grad(y, leaves, dy))


def fused_path(case: Case) -> Function:
    return lambda x, weight, bias: normalize.normalize(case.method, x, KeepLocal(), Affine(weight, bias, EPS))


def plain_path(case: Case) -> Function:
    return lambda x, weight, bias: case.method.normalize(x, KeepLocal(), layer_of(Affine(weight, bias, EPS)))


def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)


def exact(case: Case, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> Result:
    formula = REFERENCES[type(case.method)]
    return evaluate(lambda *leaves: formula([leaves[0]], *leaves[1:], eps=EPS).outputs[0], *wide(x, dy, weight, bias))


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


# --- how large an error may be -------------------------------------------------------------------


def condition(case: Case, x: Tensor) -> tuple[Tensor, Tensor]:
    """``|x| / sigma``, at least 1, and sigma; per channel."""
    x_CM = x.double().movedim(1, 0).flatten(1)
    centre_C1 = x_CM.mean(1, keepdim=True) if isinstance(case.method, BatchNorm) else 0
    sigma_C = ((x_CM - centre_C1).square().mean(1) + EPS).sqrt()
    return x_CM.abs().amax(1).div(sigma_C).clamp_min(1), sigma_C


def limits(case: Case, x: Tensor, dy: Tensor, weight: Tensor) -> Result:
    """8 units in the last place of |x| / sigma, carried to the output and to each gradient; per channel."""
    ratio_C, sigma_C = condition(case, x)
    unit = torch.finfo(torch.float64 if case.dtype is torch.float64 else torch.float32).eps
    # The raw moments travel in float64: their difference knows the variance to the square of the ratio.
    error_C = 8 * unit * ratio_C if unit > 1e-10 else 64 * unit * ratio_C.square()
    dy_CM = dy.double().movedim(1, 0).flatten(1).abs()
    largest_C, total_C = dy_CM.amax(1), dy_CM.sum(1)
    scale_C = weight.double()
    dx_C = error_C * scale_C * largest_C / sigma_C
    return Result(error_C * (scale_C + 1), dx_C, error_C * total_C, error_C * total_C)


def error(given: Tensor, expected: Tensor) -> Tensor:
    """The largest error per channel."""
    difference = (given.double() - expected).abs()
    return difference.movedim(1, 0).flatten(1).amax(1) if difference.dim() > 1 else difference


def assert_within(given: Result, expected: Result, limit: Result, *, rounding: float = 0.0) -> None:
    for name, value, truth, most_C in zip(Result._fields, given, expected, limit, strict=True):
        most_C = most_C + rounding * error(truth, torch.zeros_like(truth)) * (name in ("y", "dx"))
        excess_C = error(value, truth) - most_C
        assert (excess_C <= 0).all(), f"{name}: error {error(value, truth)}, limit {most_C}"
