"""The kernels against the executable specification, ``ChannelAffine.normalize``, and against float64.

The law of accuracy in float32: an error is at most twice that of torch's own batch norm, or 8 units in the last place
of |x| / sigma, the relative precision to which a value's distance from the mean can be known at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from distnorm import fused
from distnorm.kernels import cpu, dense
from distnorm.methods import RMS, BatchNorm, ChannelAffine
from distnorm.share import KeepLocal
from distnorm.types import Affine
from tests.support import reference

EPS = 1e-5
Function = Callable[[Tensor, Tensor, Tensor], Tensor]
REFERENCES = {BatchNorm: reference.batch_norm, RMS: reference.rms_norm}


@pytest.fixture(scope="module", params=["compiled", "compiled loops", "aten"], autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """All of it in C; the loops alone, with the formulas of the method; nothing."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param != "compiled":
            patch.setattr(dense, "loops", lambda x_NCL: None)
        if request.param == "aten":
            patch.setattr(cpu, "loops", lambda x_NCL: None)
        yield


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


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    space = st.lists(st.integers(1, 5), min_size=0, max_size=3)
    return st.builds(lambda n, c, s: (n, c, *s), st.integers(1, 7), st.integers(1, 5), space).filter(
        lambda shape: torch.Size(shape).numel() // shape[1] > 1
    )


def cases(*dtypes: torch.dtype, methods: tuple[ChannelAffine, ...]) -> st.SearchStrategy[Case]:
    layouts = ["contiguous", "channels_last", "sliced", "transposed", "expanded"]
    return st.builds(
        Case,
        shape=shapes(),
        layout=st.sampled_from(layouts),
        dy_layout=st.sampled_from(layouts),
        mean=st.sampled_from([0.0, 50.0, 1e4]),
        dtype=st.sampled_from(dtypes),
        method=st.sampled_from(methods),
        values=st.sampled_from(["normal", "rectified", "outlier", "constant"]),
        seed=st.integers(0, 99),
    )


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
    return lambda x, weight, bias: fused.normalize(case.method, x, KeepLocal(), Affine(weight, bias, EPS))


def plain_path(case: Case) -> Function:
    return lambda x, weight, bias: case.method.normalize(x, KeepLocal(), Affine(weight, bias, EPS))


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
    fused.normalize(BatchNorm(), x, KeepLocal(), Affine(weight, bias, EPS)).sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros(shape))
    torch.testing.assert_close(weight.grad, torch.zeros(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed", "expanded"])
def test_half_precision_is_summed_in_float32(layout: str, dtype: torch.dtype) -> None:
    """The gradient of the shift is the number of values, which is no number of either dtype."""
    count = 5 * 27 * 31
    x, _, weight, bias = numbers(Case((5, 3, 27, 31), layout=layout, dtype=dtype))
    bias.requires_grad_()
    fused.normalize(BatchNorm(), x, KeepLocal(), Affine(weight, bias, EPS)).backward(
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
    assert fused.suits(BatchNorm(), x) is expected


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
    y = fused.normalize(method, x, KeepLocal(), Affine(weight, bias, EPS))
    y.sum().backward()
    assert seen == ["weight", "bias"]
    assert y.shape == x.grad.shape == x.shape
    if not x.numel():
        assert not weight.grad.any() and not bias.grad.any()
