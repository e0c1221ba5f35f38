"""Norms that do what follows them, ``relu(norm(x) + residual)``, against float64: by the law of tests/support/cases.py.

Whether an output is positive can hinge on rounding. Gradients are judged by the mask that the output itself shows, and
the output by float64.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from distnorm.autograd import normalize
from distnorm.autograd.keep_local import KeepLocal
from distnorm.methods import RMS, BatchNorm
from distnorm.methods.base import layer_of
from distnorm.types import Affine, Epilogue
from tests.support.cases import EPS, REFERENCES, Case, assert_within, laid_out, limits, numbers, wide
from tests.test_normalize import cases, kernels  # noqa: F401, the latter is a fixture

TAILS = ["relu", "residual", "residual, relu"]
TAIL = st.sampled_from(TAILS)
LAYOUT = st.sampled_from(["contiguous", "channels_last", "expanded"])


def residual_of(case: Case, epilogue: str, layout: str) -> Tensor | None:
    if "residual" not in epilogue:
        return None
    generator = torch.Generator().manual_seed(case.seed + 1000)
    values = torch.randn(case.shape, generator=generator, dtype=torch.float64).to(case.dtype)
    return laid_out(values, layout)


def run(case: Case, epilogue: str, residual: Tensor | None) -> tuple[list[Tensor], Tensor | None]:
    """The output and the gradients of x, weight and bias; and that of the residual."""
    x, dy, weight, bias = numbers(case)
    leaves = [each.detach().requires_grad_() for each in (x, weight, bias)]
    added = None if residual is None else residual.detach().requires_grad_()
    affine = Affine(leaves[1], leaves[2], EPS)
    y = normalize.normalize(case.method, leaves[0], KeepLocal(), affine, epilogue=Epilogue(added, "relu" in epilogue))
    y.backward(dy)
    return [y.detach(), *(each.grad for each in leaves)], None if added is None else added.grad


def judge(case: Case, epilogue: str, layout: str) -> None:
    residual = residual_of(case, epilogue, layout)
    found, residual_grad = run(case, epilogue, residual)
    x, dy, weight, bias = numbers(case)
    leaves = [each.detach().requires_grad_() for each in wide(x, weight, bias)]
    norm = REFERENCES[type(case.method)]([leaves[0]], *leaves[1:], eps=EPS).outputs[0]
    total = norm if residual is None else norm + residual.double()
    dz = dy.double() * (found[0] > 0) if "relu" in epilogue else dy.double()
    truth = [total.relu() if "relu" in epilogue else total, *torch.autograd.grad(norm, leaves, dz)]
    allowed = limits(case, x, dy, weight)
    units = torch.finfo(case.dtype).eps if case.dtype is torch.bfloat16 else 8 * torch.finfo(case.dtype).eps
    scale = torch.stack([each.detach().abs().max() for each in (norm, total)]).max()  # the sum may cancel
    allowed = allowed._replace(y=allowed.y + 2 * units * scale)
    kind = type(allowed)
    assert_within(kind(*found), kind(*(each.detach() for each in truth)), allowed, rounding=units)
    assert found[0].dtype is found[1].dtype is x.dtype
    if residual_grad is not None:
        torch.testing.assert_close(residual_grad, dz.to(case.dtype), rtol=0, atol=0)


@settings(max_examples=100)
@given(cases(torch.float32, torch.float64, torch.bfloat16, methods=(BatchNorm(), RMS())), TAIL, LAYOUT)
@example(Case((16, 3, 33, 31), layout="channels_last", mean=50.0), "residual, relu", "contiguous")
@example(Case((5, 130, 9, 7), layout="channels_last"), "relu", "contiguous")
@example(Case((3, 70, 70, 70)), "relu", "contiguous")
@example(Case((2, 5, 70, 70)), "residual, relu", "channels_last")
@example(Case((9, 130)), "residual, relu", "contiguous")
def test_tails_agree_with_float64(case: Case, epilogue: str, layout: str) -> None:
    judge(case, epilogue, layout)


@pytest.mark.parametrize("epilogue", TAILS)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5, 4), (2, 3, 0)])
def test_no_values(shape: tuple[int, ...], epilogue: str) -> None:
    x, residual, weight, bias = (torch.ones(size, requires_grad=True) for size in (shape, shape, 3, 3))
    added = residual if "residual" in epilogue else None
    y = normalize.normalize(
        BatchNorm(), x, KeepLocal(), Affine(weight, bias, EPS), epilogue=Epilogue(added, "relu" in epilogue)
    )
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert not weight.grad.any() and not bias.grad.any()


def test_nan_passes_a_relu_both_ways() -> None:
    x, residual = torch.ones(2, 2, 1, 2), torch.zeros(2, 1, 1, 1).expand(2, 2, 1, 2).clone()
    residual[0, 0] = float("nan")
    residual[0, 1] = -float("inf")
    residual.requires_grad_()
    y = normalize.normalize(BatchNorm(), x, KeepLocal(), Affine(None, None, EPS), epilogue=Epilogue(residual, True))
    y.backward(torch.ones_like(y))
    expected = F.relu(residual.detach())
    torch.testing.assert_close(y, expected, equal_nan=True)
    assert residual.grad[:, :, 0, 0].tolist() == [[1, 0], [0, 0]]


@pytest.mark.parametrize("epilogue", TAILS)
@pytest.mark.parametrize("method", [BatchNorm(), RMS()], ids=str)
def test_second_derivatives_are_those_of_the_plain_path(method: BatchNorm | RMS, epilogue: str) -> None:
    case = Case((4, 3, 5), dtype=torch.float64, method=method)
    x, dy, weight, bias = numbers(case)
    residual = residual_of(case, epilogue, "contiguous")
    found = []
    for epilogues in (True, False):
        leaves = [each.detach().requires_grad_() for each in (x, weight, bias)]
        added = None if residual is None else residual.detach().requires_grad_()
        affine = Affine(*leaves[1:], EPS)
        if epilogues:
            y = normalize.normalize(
                method, leaves[0], KeepLocal(), affine, epilogue=Epilogue(added, "relu" in epilogue)
            )
        else:
            y = method.normalize(leaves[0], KeepLocal(), layer_of(affine))
            y = y if added is None else y + added
            y = y.relu() if "relu" in epilogue else y
        leaves += [] if added is None else [added]
        first = torch.autograd.grad((y * dy).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), leaves[:2])
        found.append([*first, *second])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
