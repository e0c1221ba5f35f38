"""Law 1: an exact policy on split batches is the method on the joined batch, to second order.

Parameter gradients are each rank's own: their sum over ranks (data parallelism takes the mean of mean losses) is the
joined batch's.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from distnorm import Recipe
from tests.laws.ranks import Answer, Case, answer_on_rank, random_case
from tests.support.reference import Normalized
from tests.support.threads import run_threads
from tests.zoo import EXACT, METHODS, MethodUnderTest, pairs

SPLITS = st.lists(st.integers(0, 4), min_size=2, max_size=4).filter(lambda sizes: sum(sizes) >= 2)
SPATIAL = st.sampled_from([(), (3,), (2, 3), (1, 2, 3)])


def joined_answer(case: Case, under_test: MethodUnderTest) -> tuple[list[Answer], Answer]:
    """Per-rank answers and sums over ranks, from the reference alone, in float64."""
    inputs = [x.to(torch.float64, copy=True).requires_grad_() for x in case.inputs]
    weight, bias = (each.to(torch.float64, copy=True).requires_grad_() for each in (case.weight, case.bias))
    found: Normalized = under_test.reference(inputs, weight, bias)
    loss = sum((y * dy.double()).sum() for y, dy in zip(found.outputs, case.cotangents, strict=True))
    assert isinstance(loss, Tensor)
    *dx, dweight, dbias = torch.autograd.grad(loss, [*inputs, weight, bias], create_graph=True)
    penalty = sum(each.square().sum() for each in dx)
    assert isinstance(penalty, Tensor)
    *ddx, ddweight = torch.autograd.grad(penalty, [*inputs, weight])
    common = dweight, dbias, ddweight, found.running_mean, found.running_var
    per_rank = [
        Answer(*(value.detach() for value in (*each, *common))) for each in zip(found.outputs, dx, ddx, strict=True)
    ]
    return per_rank, per_rank[0]


def assert_near(given: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    if not expected.numel():
        assert given.numel() == 0, what
        return
    error = (given.double() - expected).abs().max() / expected.abs().max().clamp_min(1)
    assert error <= tolerance, f"{what}: relative error {error:.1e}, allowed {tolerance:.1e}"


def total(answers: list[Answer], name: str) -> Tensor:
    return torch.stack([getattr(each, name) for each in answers]).sum(0)


def _channels(case: Case) -> Tensor:
    return torch.cat([each.double().transpose(0, 1).flatten(1) for each in case.inputs], dim=1)


def conditioning(case: Case) -> float:
    """mean^2 / var of the worst channel: what the squared sums in the payload lose."""
    x = _channels(case)
    return float((x.mean(1).square() / (x.var(1, correction=0) + 1e-5)).max())


def spread(case: Case) -> float:
    """The smallest standard deviation of a channel."""
    return float((_channels(case).var(1, correction=0) + 1e-5).sqrt().min())


@pytest.mark.parametrize(("under_test", "policy"), pairs(EXACT))
@given(sizes=SPLITS, spatial=SPATIAL, mean=st.sampled_from([0.0, 50.0]), seed=st.integers(0, 2**16))
def test_split_equals_joined(policy, under_test, sizes, spatial, mean, seed):
    case = random_case(sizes, spatial, mean=mean, seed=seed)
    answers = run_threads(len(sizes), answer_on_rank, case, Recipe(method=under_test.method, policy=policy))
    expected, joined = joined_answer(case, under_test)
    tolerance = 1e-10 + 8 * torch.finfo(torch.float64).eps * conditioning(case)
    # Each derivative divides by sigma once more, and hypothesis finds channels whose few values lie close together.
    steep = max(1.0, 1 / spread(case))
    for rank, (found, right) in enumerate(zip(answers, expected, strict=True)):
        assert_near(found.y, right.y, tolerance, f"y on rank {rank}")
        assert_near(found.dx, right.dx, tolerance * steep, f"dx on rank {rank}")
        assert_near(found.ddx, right.ddx, tolerance * steep**2, f"ddx on rank {rank}")
        assert_near(found.running_mean, right.running_mean, tolerance, f"running_mean on rank {rank}")
        assert_near(found.running_var, right.running_var, tolerance, f"running_var on rank {rank}")
    assert_near(total(answers, "dweight"), joined.dweight, tolerance, "dweight")
    assert_near(total(answers, "dbias"), joined.dbias, tolerance, "dbias")
    assert_near(total(answers, "ddweight"), joined.ddweight, tolerance * steep**2, "ddweight")


@pytest.mark.parametrize("policy", EXACT.values(), ids=EXACT.keys())
@given(sizes=SPLITS, mean=st.sampled_from([0.0, 30.0, 1e3, 1e4]), seed=st.integers(0, 2**16))
def test_float32_is_as_good_as_stock(policy, sizes, mean, seed):
    """Error at most twice that of stock batch norm on the joined batch, or 8 ulp of |x| / sigma."""
    case = random_case(sizes, (4, 4), mean=mean, seed=seed, dtype=torch.float32)
    under_test = METHODS["BatchNorm"]
    answers = run_threads(len(sizes), answer_on_rank, case, Recipe(method=under_test.method, policy=policy))
    expected, _ = joined_answer(case, under_test)
    stock_y, stock_dx = _stock(case)
    ulps = 8 * torch.finfo(torch.float32).eps * (conditioning(case) ** 0.5 + 1)
    for name, stock in (("y", stock_y), ("dx", stock_dx)):
        right = torch.cat([getattr(each, name) for each in expected])
        ours = torch.cat([getattr(each, name) for each in answers])
        scale = float(right.abs().max().clamp_min(1))
        allowed = max(2 * float((stock.double() - right).abs().max()), ulps * scale)
        assert float((ours.double() - right).abs().max()) <= allowed, name


def _stock(case: Case) -> tuple[Tensor, Tensor]:
    layer = nn.BatchNorm2d(3)
    layer.weight.data.copy_(case.weight)
    layer.bias.data.copy_(case.bias)
    x = torch.cat(case.inputs).requires_grad_()
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.cat(case.cotangents))
    return y.detach(), dx
