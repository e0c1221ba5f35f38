"""The kernels against the executable specification, ``ChannelAffine.normalize``, and against float64.

tests/support/cases.py has the law of accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distnorm.autograd import normalize
from distnorm.autograd.keep_local import KeepLocal
from distnorm.kernels import cpu, dense
from distnorm.methods import RMS, BatchNorm, ChannelAffine
from distnorm.types import Affine
from tests.support.cases import (
    EPS,
    LAYOUTS,
    MEANS,
    VALUES,
    Case,
    Result,
    assert_within,
    error,
    evaluate,
    exact,
    fused_path,
    limits,
    numbers,
    plain_path,
    stock,
)


@pytest.fixture(scope="module", params=["compiled", "compiled loops", "aten"], autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """All of it in C; the loops alone, with the formulas of the method; nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "compiled":
            patch.setattr(dense, "loops", lambda x_NCL: None)
        if request.param == "aten":
            patch.setattr(cpu, "loops", lambda x_NCL: None)
        yield


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    space = st.lists(st.integers(1, 5), min_size=0, max_size=3)
    return st.builds(lambda n, c, s: (n, c, *s), st.integers(1, 7), st.integers(1, 5), space).filter(
        lambda shape: torch.Size(shape).numel() // shape[1] > 1
    )


def cases(*dtypes: torch.dtype, methods: tuple[ChannelAffine, ...]) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        shape=shapes(),
        layout=st.sampled_from(LAYOUTS),
        dy_layout=st.sampled_from(LAYOUTS),
        mean=st.sampled_from(MEANS),
        dtype=st.sampled_from(dtypes),
        method=st.sampled_from(methods),
        values=st.sampled_from(VALUES),
        seed=st.integers(0, 99),
    )


# --- the laws ------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(cases(torch.float32, methods=(BatchNorm(),)))
@example(Case((128, 3), values="outlier"))
@example(Case((1, 2, 3), mean=1e4))
@example(Case((5, 1), mean=50.0))
@example(Case((16, 3, 33, 31), layout="channels_last", mean=50.0))
def test_float32_is_as_accurate_as_stock(case: Case) -> None:
    tensors = numbers(case)
    truth = exact(case, *tensors)
    ours = evaluate(fused_path(case), *tensors)
    theirs = evaluate(stock, *tensors)
    allowed = limits(case, *tensors[:3])
    twice = Result(*(2 * error(value, expected) for value, expected in zip(theirs, truth, strict=True)))
    assert_within(ours, truth, Result(*map(torch.maximum, twice, allowed)))


@settings(max_examples=100)
@given(cases(torch.float32, torch.float64, torch.bfloat16, methods=(BatchNorm(), RMS())))
@example(Case((64, 3), values="outlier"))
def test_both_paths_agree_with_float64(case: Case) -> None:
    tensors = numbers(case)
    truth, allowed = exact(case, *tensors), limits(case, *tensors[:3])
    rounding = torch.finfo(case.dtype).eps if case.dtype is torch.bfloat16 else 0.0
    for path in (fused_path, plain_path):
        assert_within(evaluate(path(case), *tensors), truth, allowed, rounding=rounding)


@given(cases(torch.float32, torch.float64, torch.bfloat16, torch.float16, methods=(BatchNorm(), RMS())))
def test_shapes_and_dtypes(case: Case) -> None:
    x, dy, weight, bias = numbers(case)
    ours = evaluate(fused_path(case), x, dy, weight, bias)
    plain = evaluate(plain_path(case), x, dy, weight, bias)
    assert [(each.shape, each.dtype) for each in ours] == [(each.shape, each.dtype) for each in plain]
    assert (ours.y.shape, ours.y.dtype) == (ours.dx.shape, ours.dx.dtype) == (x.shape, x.dtype)


@given(cases(torch.float32, torch.float64, methods=(BatchNorm(),)))
def test_the_layout_of_the_output_is_that_of_stock(case: Case) -> None:
    tensors = numbers(case)
    assert evaluate(fused_path(case), *tensors).y.stride() == evaluate(stock, *tensors).y.stride()


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 5), (6, 3, 5, 4)])
def test_a_plain_sum_sends_an_expanded_gradient(shape: tuple[int, ...]) -> None:
    """``y.sum().backward()``: dy has zero strides, and the gradient for x is zero."""
    x, _, weight, bias = numbers(Case(shape))
    x.requires_grad_()
    weight.requires_grad_()
    normalize.normalize(BatchNorm(), x, KeepLocal(), Affine(weight, bias, EPS)).sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros(shape))
    torch.testing.assert_close(weight.grad, torch.zeros(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed", "expanded"])
def test_half_precision_is_summed_in_float32(layout: str, dtype: torch.dtype) -> None:
    """The gradient of the shift is the number of values, which is no number of either dtype."""
    count = 5 * 27 * 31
    x, _, weight, bias = numbers(Case((5, 3, 27, 31), layout=layout, dtype=dtype))
    bias.requires_grad_()
    normalize.normalize(BatchNorm(), x, KeepLocal(), Affine(weight, bias, EPS)).backward(
        torch.ones((), dtype=dtype).expand_as(x)
    )
    assert bias.grad.tolist() == [count] * 3


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.zeros(2, 3), True),
        (torch.zeros(0, 3), True),
        (torch.zeros(2, 3, 0), True),
        (torch.zeros(2, 3, device="meta"), False),
    ],
)
def test_which_inputs_the_kernels_take(x: Tensor, expected: bool) -> None:
    assert normalize.suits(BatchNorm(), x) is expected


@pytest.mark.parametrize("method", [BatchNorm(), RMS()])
@pytest.mark.parametrize("shape", [(4, 3), (0, 3), (0, 3, 5), (2, 3, 0), (0, 3, 5, 4)])
def test_gradients_reach_parameters_in_one_order_whatever_the_batch(
    shape: tuple[int, ...], method: ChannelAffine
) -> None:
    """A rank without values, too: DeepSpeed's ZeRO 2 adds up gradients of ranks in the order in which they come."""
    x, weight, bias = (torch.ones(size, requires_grad=True) for size in (shape, 3, 3))
    seen = []
    for name, parameter in (("weight", weight), ("bias", bias)):
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: seen.append(name))
    y = normalize.normalize(method, x, KeepLocal(), Affine(weight, bias, EPS))
    y.sum().backward()
    assert seen == ["weight", "bias"]
    assert y.shape == x.grad.shape == x.shape
    if not x.numel():
        assert not weight.grad.any() and not bias.grad.any()
