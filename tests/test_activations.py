"""Activations behind a norm, computed with it: against torch's in float64, their derivatives, and what is kept."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distnorm
from distnorm.autograd import normalize
from distnorm.autograd.keep_local import KeepLocal
from distnorm.kernels.activations import ACTIVATIONS, NUMBERS, named
from distnorm.methods import RMS, BatchNorm, ChannelAffine
from distnorm.types import Activation, Affine, Epilogue
from tests.support import activations_header
from tests.support.cases import EPS, REFERENCES, Case, numbers
from tests.test_normalize import kernels  # noqa: F401, a fixture

# Written out again, with torch's functions, so that a wrong row of the table shows.
EXPECTED = {
    Activation("relu"): F.relu,
    Activation("relu6"): F.relu6,
    Activation("leaky_relu", 0.2): lambda z: F.leaky_relu(z, 0.2),
    Activation("leaky_relu", -0.5): lambda z: F.leaky_relu(z, -0.5),
    Activation("elu", 1.0): F.elu,
    Activation("elu", 0.3): lambda z: F.elu(z, 0.3),
    Activation("sigmoid"): torch.sigmoid,
    Activation("silu"): F.silu,
    Activation("mish"): F.mish,
    Activation("gelu"): F.gelu,
    Activation("gelu_tanh"): lambda z: F.gelu(z, approximate="tanh"),
    Activation("hardsigmoid"): F.hardsigmoid,
    Activation("hardswish"): F.hardswish,
}
EACH = pytest.mark.parametrize("activation", EXPECTED, ids=lambda each: f"{each.name} {each.parameter}")

# Several blocks of planes and of rows, odd sizes, whole and broken vectors.
SHAPES = [(3, 2, 5), (2, 3, 70, 70), (5, 70, 7, 7), (9, 130), (2, 5, 3, 5, 7), (2, 4, 1, 1)]
CASES = [
    Case((4, 3, 33, 31), dtype=torch.float64),
    Case((4, 6, 9, 7), dtype=torch.bfloat16, mean=3.0),
    Case((4, 6, 9, 7), layout="channels_last", dtype=torch.bfloat16, method=RMS()),
    *(
        Case(shape, layout, dy_layout, mean=2.0, method=method)
        for shape in SHAPES
        for layout, dy_layout, method in (
            ("contiguous", "contiguous", BatchNorm()),
            ("channels_last", "channels_last", RMS()),
            ("contiguous", "channels_last", BatchNorm()),
        )
    ),
]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 3e-6, torch.bfloat16: 2e-2}


def spread(case: Case) -> list[Tensor]:
    """Numbers whose normalized values lie on both sides of every bend."""
    x, dy, weight, bias = numbers(case)
    return [x, dy, weight * 3, bias * 2]


def ours(case: Case, activation: Activation, *tensors: Tensor) -> Tensor:
    x, weight, bias = tensors
    affine = Affine(weight, bias, EPS)
    return normalize.normalize(case.method, x, KeepLocal(), affine, epilogue=Epilogue(None, activation))


@EACH
def test_value_and_gradients_agree_with_float64(activation: Activation) -> None:
    for case in CASES:
        x, dy, weight, bias = spread(case)
        leaves = [each.detach().requires_grad_() for each in (x, weight, bias)]
        y = ours(case, activation, *leaves)
        found = y, *torch.autograd.grad(y, leaves, dy)
        exact = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
        z = REFERENCES[type(case.method)]([exact[0]], *exact[1:], eps=EPS).outputs[0]
        if case.dtype is torch.bfloat16:  # on which side of a bend it lies hinges on its rounding
            z = z + (z.to(case.dtype) - z).detach()
        truth = EXPECTED[activation](z)
        expected = truth, *torch.autograd.grad(truth, exact, dy.double())
        assert y.dtype is x.dtype
        for one, two in zip(found, expected, strict=True):
            tolerance = TOLERANCES[case.dtype] * max(1.0, float(two.detach().abs().max()))
            tolerance *= math.sqrt(x.numel() / x.shape[1]) if two.dim() == 1 else 1  # sums over the batch
            torch.testing.assert_close(one.double(), two, rtol=0, atol=tolerance)


MILD = [math.inf, -math.inf, math.nan, 20.5, -20.5, 12.0, -12.0, 6.0, 3.0, -3.0, 0.3, -0.3, 1e-6, -1e-6, 0.0, -0.0]
WILD = [1e38, -1e38, 1e30, -1e30, 105.0, -105.0, 89.0, -89.0, 88.5, -88.5, 1e-38, -1e-38]
"""Infinity times what is almost 0 hinges on how numbers below 1e-38 are rounded."""


@pytest.mark.parametrize("incoming", [1.0, math.inf, math.nan])
@EACH
def test_extremes_come_out_as_from_torch(activation: Activation, incoming: float) -> None:
    """By a weight of 0, an output is the bias. Torch's loops over vectors and over single values differ at NaN."""
    values = MILD + WILD * math.isfinite(incoming)
    bias, weight = torch.tensor(values, requires_grad=True), torch.zeros(len(values))
    x = torch.randn(4, len(values), 3, 3, generator=torch.Generator().manual_seed(0))
    y = ours(Case(()), activation, x, weight, bias)
    dy = torch.zeros_like(y)
    dy[0, :, 0, 0] = incoming
    (grad,) = torch.autograd.grad(y, bias, dy)
    for value, *found in zip(values, y[0, :, 0, 0].tolist(), grad.tolist(), strict=True):
        both = [torch_at(activation, value, incoming, width) for width in (1, 64)]
        for one, *allowed in zip(found, *both, strict=True):
            assert any(one == pytest.approx(each, rel=1e-4, abs=2e-7, nan_ok=True) for each in allowed), (
                value,
                allowed,
            )


def torch_at(activation: Activation, value: float, incoming: float, width: int) -> tuple[float, float]:
    """Value and gradient at one of ``width`` equal values."""
    z = torch.full((width,), value).requires_grad_()
    y = EXPECTED[activation](z)
    (grad,) = torch.autograd.grad(y, z, torch.full((width,), incoming))
    return float(y[0].detach()), float(grad[0])


@pytest.mark.parametrize("method", [BatchNorm(), RMS()], ids=str)
@pytest.mark.parametrize("activation", [each for each in EXPECTED if each.name != "hardsigmoid"], ids=str)
def test_second_derivatives_are_those_of_plain_autograd(activation: Activation, method: ChannelAffine) -> None:
    """Torch has none of hardsigmoid."""
    case = Case((4, 3, 5), dtype=torch.float64, method=method)
    x, dy, weight, bias = spread(case)
    found = []
    for one in (True, False):
        leaves = [each.detach().requires_grad_() for each in (x, weight, bias)]
        outgoing = dy.detach().requires_grad_()
        if one:
            y = ours(case, activation, *leaves)
        else:
            y = EXPECTED[activation](REFERENCES[type(method)]([leaves[0]], *leaves[1:], eps=EPS).outputs[0])
        first = torch.autograd.grad(y, leaves, outgoing, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), [*leaves, outgoing])
        found.append([*first, *second])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5, 4), (2, 3, 0)])
@EACH
def test_no_values(activation: Activation, shape: tuple[int, ...]) -> None:
    x, weight, bias = (torch.ones(size, requires_grad=True) for size in (shape, 3, 3))
    y = ours(Case(shape), activation, x, weight, bias)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape
    assert not weight.grad.any() and not bias.grad.any()


# --- layers ----------------------------------------------------------------------------------------


def kept(run: nn.Module | object, x: Tensor) -> int:
    """Bytes that the graph keeps for its backward pass, beside x, y and what is per channel."""
    found: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        found[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = run(x)
    channels = 64 * x.shape[1]
    aside = {each.untyped_storage().data_ptr() for each in (x, y)}
    return sum(size for at, size in found.items() if at not in aside and size > channels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@EACH
def test_what_the_activation_was_applied_to_is_not_kept(activation: Activation, dtype: torch.dtype) -> None:
    x = torch.randn(8, 4, 48, 48, dtype=dtype).requires_grad_()  # more than torch's batch norm computes
    stock = nn.BatchNorm2d(4).to(dtype)
    ours = distnorm.convert(nn.Sequential(nn.BatchNorm2d(4).to(dtype)), "local_bn")[0]
    one = kept(lambda x: ours(x, activation=activation.name, parameter=activation.parameter), x)
    two = kept(lambda x: EXPECTED[activation](stock(x)), x)
    assert one == 0
    from_output = activation.name in ("relu", "sigmoid")  # whose backward reads the output alone
    assert two == (0 if from_output else x.numel() * x.itemsize)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@EACH
def test_a_layer_computes_it_everywhere(activation: Activation, training: bool, residual: bool) -> None:
    layer = distnorm.convert(nn.Sequential(nn.BatchNorm2d(3)), "local_bn")[0].double().train(training)
    stock = nn.BatchNorm2d(3).double().train(training)
    tensors = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    runs = []
    for one in (True, False):
        x, added = (each.clone().requires_grad_() for each in tensors)
        given = added if residual else None
        if one:
            y = layer(x, residual=given, activation=activation.name, parameter=activation.parameter)
        else:
            y = EXPECTED[activation](stock(x) + given if residual else stock(x))
        y.square().sum().backward()
        runs.append([y, x.grad, *([added.grad] if residual else [])])
    for found, expected in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected)


def test_an_unknown_name_is_refused() -> None:
    layer = distnorm.convert(nn.Sequential(nn.BatchNorm2d(3)), "local_bn")[0]
    with pytest.raises(ValueError, match="activation='swish': allowed are relu, relu6, leaky_relu, "):
        layer(torch.randn(2, 3, 4, 4), activation="swish")


# --- the table ---------------------------------------------------------------------------------------


def test_the_formulas_in_c_are_those_of_triton() -> None:
    assert activations_header.HEADER.read_text() == activations_header.header(), activations_header.__doc__


def test_formulas_are_in_the_order_of_the_table() -> None:
    listed = activations_header.HEADER.read_text().split("FORMULAS_OF_ACTIVATIONS(F)")[1].replace("\\", "").split()
    assert ["relu", *(each.removeprefix("F(").removesuffix(")") for each in listed)] == list(NUMBERS)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_parameters_are_named_as_torch_names_them(name: str) -> None:
    row = ACTIVATIONS[name]
    for each in row.functions if row.option else ():
        found = inspect.signature(each).parameters if inspect.isfunction(each) else {}
        assert not found or found[row.option].default == row.default
    if row.option:
        assert getattr(row.layer(), row.option) == row.default
    assert {each.name for each in EXPECTED} == set(ACTIVATIONS) and named(name).name == name
