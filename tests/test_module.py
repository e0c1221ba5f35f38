"""The layer: dtypes, layouts, modes, and what it says about bad input."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

import distnorm
from distnorm.methods import RMS
from distnorm.policies import AllReduce
from distnorm.recipe import Recipe
from tests.support import reference
from tests.training import batches, converted, made, same, step, train

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
RMS_RECIPE = Recipe(method=RMS(), policy=AllReduce())


def norm(**options: object) -> nn.BatchNorm2d:
    return made(nn.BatchNorm2d, 3, **options)


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return batches((6, 3, 5, 4), 1, dtype=dtype)[0]


# --- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cast_layer", [True, False], ids=["model cast", "input cast"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_in_is_dtype_out(dtype: torch.dtype, cast_layer: bool) -> None:
    layer = converted(norm())
    if cast_layer or dtype is torch.float64:
        layer.to(dtype)
    x = images(dtype).requires_grad_()
    y = layer(x)
    y.backward(torch.ones_like(y))
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    assert layer.weight.grad.dtype == layer.weight.dtype
    expected = reference.batch_norm([x.detach()], layer.weight.detach(), layer.bias.detach())
    eps = max(torch.finfo(dtype).eps, 1e-14)  # one rounding to the dtype, or float64's own
    torch.testing.assert_close(y.double(), expected.outputs[0], rtol=eps, atol=4 * eps if eps < 1e-3 else 1e-6)
    assert layer.eval()(x).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_statistics_are_at_least_float32(dtype: torch.dtype) -> None:
    layer = converted(norm())
    means = layer.running_mean.clone(), layer.running_var.clone()
    layer.to(dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert (layer.weight.dtype, layer.running_mean.dtype, layer.running_var.dtype) == (dtype, wide, wide)
    assert layer.num_batches_tracked.dtype == torch.int64
    assert torch.equal(layer.running_mean, means[0].to(wide)) and torch.equal(layer.running_var, means[1].to(wide))
    x = images(dtype)
    layer(x)
    expected = reference.batch_norm([x], running_mean=means[0], running_var=means[1])
    torch.testing.assert_close(layer.running_mean, expected.running_mean.to(wide), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var, expected.running_var.to(wide), rtol=1e-6, atol=1e-6)


def test_casting_back_and_forth() -> None:
    layer = converted(norm())
    mean = layer.running_mean.clone()
    layer.half().bfloat16().double().float()
    assert layer.running_mean.dtype == layer.weight.dtype == torch.float32
    assert torch.equal(layer.running_mean, mean)
    x = images()
    assert layer(x).dtype == layer.eval()(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_dtype_of_stock(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Flatten(2), nn.BatchNorm1d(4))
    mine, x = converted(stock), images()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16):
        given, expected = ([each[0](x), each[:2](x), each(x), each[1](each[0](x).float())] for each in (mine, stock))
    assert [y.dtype for y in given] == [y.dtype for y in expected]
    assert given[1].dtype == dtype
    for y, reference_y in zip(given, expected, strict=True):
        torch.testing.assert_close(y, reference_y, rtol=1.6e-2, atol=1.6e-2)
    given[2].sum().backward()
    assert mine[0].weight.grad.dtype == torch.float32


# --- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dy_format", ["same", "contiguous", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "shape", "memory_format"),
    [
        (nn.BatchNorm2d, (4, 3, 5, 6), torch.contiguous_format),
        (nn.BatchNorm2d, (4, 3, 5, 6), torch.channels_last),
        (nn.BatchNorm3d, (4, 3, 2, 5, 6), torch.channels_last_3d),
    ],
    ids=["contiguous", "channels_last", "channels_last_3d"],
)
def test_the_memory_format_is_kept(
    kind: type[nn.Module],
    shape: tuple[int, ...],
    memory_format: torch.memory_format,
    dtype: torch.dtype,
    dy_format: str,
) -> None:
    layer = converted(kind(3))
    x = batches(shape, 1, dtype=dtype)[0].contiguous(memory_format=memory_format).requires_grad_()
    y = layer(x)
    dense = {"same": memory_format, "contiguous": torch.contiguous_format}
    one = torch.ones((), dtype=dtype).expand(shape)
    dy = one if dy_format == "expanded" else torch.randn(shape).to(dtype).contiguous(memory_format=dense[dy_format])
    y.backward(dy)
    assert y.stride() == x.stride()
    assert x.grad.stride() == x.stride()
    assert layer.eval()(x).stride() == x.stride()


@pytest.mark.parametrize("training", [True, False])
def test_meta(training: bool) -> None:
    layer = converted(norm()).train(training).to("meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    x = torch.empty(6, 3, 5, 4, device="meta", requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert (y.shape, x.grad.shape, y.device.type) == (x.shape, x.shape, "meta")
    assert layer.eval()(x).shape == layer.train()(x).shape == x.shape


# --- modes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "layer_dtype"), [(t, t) for t in DTYPES[2:]] + [(t, torch.float32) for t in DTYPES[:3]]
)
def test_evaluation_is_stock_bit_for_bit(
    dtype: torch.dtype, layer_dtype: torch.dtype, options: dict[str, object]
) -> None:
    stock = norm(**options).to(layer_dtype).eval()
    x, same_x = (images(dtype).requires_grad_() for _ in range(2))
    y, expected = converted(stock)(x), stock(same_x)
    assert torch.equal(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(x.grad, same_x.grad)


@pytest.mark.parametrize("frozen", [["weight"], ["bias"], ["weight", "bias"]])
def test_frozen_affine(frozen: list[str]) -> None:
    stock = norm()
    for name in frozen:
        getattr(stock, name).requires_grad_(False)
    mine, inputs = converted(stock), batches((6, 3, 5, 4))
    same(train(mine, inputs), train(stock, inputs))
    assert all(getattr(mine, name).grad is None for name in frozen)


def test_an_input_without_gradient() -> None:
    stock, x = norm(), images()
    mine = converted(stock)
    for layer in (mine, stock):
        layer(x).square().sum().backward()
    torch.testing.assert_close(mine.weight.grad, stock.weight.grad)
    torch.testing.assert_close(mine.bias.grad, stock.bias.grad)


def test_a_layer_in_eval_within_a_model_in_training() -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 3, 3), norm(), nn.ReLU())
    mine = converted(stock)
    x = images()
    for model in (mine, stock):
        model.train()[1].eval()
    same(step(mine, x), step(stock, x), exactly=True)
    assert mine[1].num_batches_tracked == 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_forward_without_gradient(mode: type) -> None:
    stock, x = norm(), images()
    mine = converted(stock)
    with mode():
        y, expected = mine(x.clone().requires_grad_()), stock(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, expected)
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(getattr(mine, name), buffer)


def test_functional_call() -> None:
    stock, x = norm(), images()
    mine = converted(stock)
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    passed = []
    for layer in (mine, stock):
        values = {"weight": torch.full((3,), 2.0, requires_grad=True), "running_mean": torch.full((3,), 7.0)}
        torch.func.functional_call(layer, values, x).square().sum().backward()
        passed.append(values)
    torch.testing.assert_close(passed[0]["weight"].grad, passed[1]["weight"].grad)
    torch.testing.assert_close(passed[0]["running_mean"], passed[1]["running_mean"])
    assert not torch.equal(passed[0]["running_mean"], torch.full((3,), 7.0))
    assert torch.equal(mine.running_mean, before["running_mean"]) and torch.equal(mine.weight, before["weight"])
    assert mine.weight.grad is None


@pytest.mark.parametrize("recipe", ["sync_bn", RMS_RECIPE], ids=["batch norm", "rms"])
def test_an_empty_batch_changes_nothing(recipe: Recipe | str) -> None:
    layer = converted(norm(), recipe)
    layer(images())
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    x = torch.empty(0, 3, 5, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert torch.equal(layer.weight.grad, torch.zeros(3)) and torch.equal(layer.bias.grad, torch.zeros(3))
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name
    assert layer.eval()(x).shape == x.shape


# --- bad input -----------------------------------------------------------------------------------

BAD = [
    (torch.zeros(4, 5, 2, 2), ValueError, r"^0\.1: given 5 channels \(shape \(4, 5, 2, 2\)\); the layer normalizes 3,"),
    (torch.zeros(4, 3), ValueError, r"^0\.1: expected 4D input \(got 2D input\)"),
    (torch.zeros(4, 3, 2, 2, dtype=torch.int64), TypeError, r"^0\.1: given torch.int64 values; .* floating-point"),
    (
        torch.zeros(4, 3, 2, 2, dtype=torch.complex64),
        TypeError,
        r"^0\.1: given torch.complex64 values; .* floating-point",
    ),
    (
        torch.zeros(1, 3, 1, 1),
        ValueError,
        r"^0\.1: 1 value per channel across 1 rank; training needs at least 2\. Raise the batch size",
    ),
]


@pytest.mark.parametrize(("x", "kind", "message"), BAD, ids=["channels", "dims", "integer", "complex", "one value"])
def test_bad_input_names_the_layer_and_what_is_allowed(x: Tensor, kind: type[Exception], message: str) -> None:
    model = nn.Sequential(nn.Sequential(nn.Identity(), norm()))
    distnorm.convert(model, "sync_bn")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=message):
        model(x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    if "1 value" not in message:
        with pytest.raises(kind, match=message):
            model.eval()(x)


@pytest.mark.parametrize(("kind", "dims"), [(nn.BatchNorm1d, 4), (nn.BatchNorm3d, 4), (nn.SyncBatchNorm, 1)])
def test_wrong_number_of_dimensions(kind: type[nn.Module], dims: int) -> None:
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: expected .* \(got {dims}D input\)"):
        converted(kind(2))(torch.zeros(2, 2, 2, 2)[(0,) * (4 - dims)])


# --- RMS after a stock training ------------------------------------------------------------------


def test_stock_statistics_are_folded_at_the_first_training_step(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="distnorm")
    stock, x = nn.Sequential(norm(), norm()).eval(), images()
    mine = converted(stock, RMS_RECIPE)
    mean, var = stock[0].running_mean, stock[0].running_var
    for _ in range(2):
        assert torch.equal(mine(x), stock(x))
    assert not caplog.records
    mine.train()
    for at in range(3):
        mine(x)
        assert not mine[0].running_mean.any()
        if at == 0:
            moment = x.square().mean((0, 2, 3))
            torch.testing.assert_close(mine[0].running_var, 0.9 * (var + mean.square()) + 0.1 * moment)
    assert [record.getMessage() for record in caplog.records] == [
        "running statistics of 2 layers: running_var += running_mean^2, running_mean = 0"
    ]
    mine.load_state_dict(stock.state_dict())
    assert torch.equal(mine.eval()(x), stock(x))
    mine.train()(x)
    assert not mine[1].running_mean.any() and len(caplog.records) == 2


def test_nothing_to_fold_is_nothing_to_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="distnorm")
    converted(nn.BatchNorm2d(3), RMS_RECIPE)(images())
    converted(norm())(images())  # a method with centring has nothing to fold either
    assert not caplog.records
