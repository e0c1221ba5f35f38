"""Activations in the kernels for GPUs, against torch's in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from distnorm.methods import RMS
from distnorm.types import Activation
from tests.support.cases import EPS, REFERENCES, Case
from tests.support.gpu import DEVICES, cut_small, run_on
from tests.support.interpreter import INTERPRETED
from tests.support.thinned import thinned
from tests.test_activations import EACH, EXPECTED, ours, spread

pytestmark = INTERPRETED

CASES = [
    Case((3, 4, 5, 3), mean=2.0),
    Case((3, 5, 4, 4), layout="channels_last", method=RMS()),
    Case((6, 3), dtype=torch.bfloat16),
]


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from run_on(request.param)


@pytest.fixture(scope="module")
def cut() -> Iterator[str]:
    yield from cut_small("cut")


@EACH
@pytest.mark.parametrize("case", thinned(CASES, every=3), ids=str)
def test_value_and_gradients_agree_with_float64(device: str, cut: str, activation: Activation, case: Case) -> None:
    x, dy, weight, bias = (each.to(device) for each in spread(case))
    leaves = [each.detach().requires_grad_() for each in (x, weight, bias)]
    y = ours(case, activation, *leaves)
    found = y, *torch.autograd.grad(y, leaves, dy)
    exact = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    z = REFERENCES[type(case.method)]([exact[0]], *exact[1:], eps=EPS).outputs[0]
    truth = EXPECTED[activation](z)
    expected = truth, *torch.autograd.grad(truth, exact, dy.double())
    rounding = 2e-2 if case.dtype is torch.bfloat16 else 1e-5
    for one, two in zip(found, expected, strict=True):
        tolerance = rounding * max(1.0, float(two.detach().abs().max()))
        torch.testing.assert_close(one.double(), two, rtol=0, atol=tolerance)
    assert y.dtype is x.dtype


@pytest.mark.parametrize("name", ["silu", "mish", "gelu", "elu"])
def test_extremes_are_not_finite_where_torchs_are_not(device: str, name: str) -> None:
    """Formulas that divide or take an exponential; an output is the bias, by a weight of 0."""
    activation = Activation(name, 1.0)
    values = torch.tensor([float("nan"), float("inf"), 1e30, -1e30, 89.0, -89.0, 0.0], device=device)
    bias, weight = values.clone().requires_grad_(), torch.zeros_like(values)
    y = ours(Case(()), activation, torch.randn(2, len(values), 2, 2).to(device), weight, bias)
    (grad,) = torch.autograd.grad(y[0, :, 0, 0].sum(), bias)
    z = values.cpu().double().requires_grad_()
    truth = EXPECTED[activation if activation in EXPECTED else Activation(name)](z)
    (expected,) = torch.autograd.grad(truth.sum(), z)
    torch.testing.assert_close(y[0, :, 0, 0].cpu().double()[1:], truth[1:], rtol=1e-4, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(grad.cpu().double()[2:], expected[2:], rtol=1e-4, atol=1e-6, equal_nan=True)
    assert y[0, 0].isnan().all()
