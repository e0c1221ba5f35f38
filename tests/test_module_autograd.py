"""The layer under autograd: derivatives of both orders, and graphs that are used in unusual ways."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad, gradcheck, gradgradcheck
from torch.multiprocessing.reductions import StorageWeakRef

import distnorm
from distnorm.methods import RMS, BatchNorm, Method
from distnorm.policies import AllReduce
from distnorm.recipe import Recipe
from tests.training import batches, converted, same, train, worn

SHAPES = [(5, 3), (4, 2, 2, 3)]
METHODS = [BatchNorm(), RMS()]


@pytest.fixture(params=["fused", "plain"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("distnorm.autograd.normalize.suits", lambda method, x, *_: request.param == "fused")
    return request.param


def norm(shape: tuple[int, ...], **options: object) -> nn.Module:
    kind = nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d
    return worn(kind(shape[1], dtype=torch.float64, **options))


def values(shape: tuple[int, ...]) -> Tensor:
    return batches(shape, 1, dtype=torch.float64)[0].requires_grad_()


# --- derivatives against finite differences ------------------------------------------------------


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain scale"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_first_and_second_derivatives(shape: tuple[int, ...], method: Method, affine: bool) -> None:
    layer = converted(norm(shape, affine=affine), Recipe(method=method, policy=AllReduce()))
    names = ["weight", "bias"] if affine else []

    def run(x: Tensor, *affine_values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, affine_values, strict=True)), x)

    inputs = values(shape), *(getattr(layer, name) for name in names)
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


@pytest.mark.usefixtures("path")
def test_a_gradient_penalty_is_stock_s() -> None:
    stock, x = norm(SHAPES[1]), values(SHAPES[1])
    results = []
    for layer in (converted(stock), stock):
        (dx,) = grad((layer(x) * x.detach().sin()).sum(), x, create_graph=True)
        results.append(grad(dx.square().sum(), (x, layer.weight)))
    torch.testing.assert_close(*results)


# --- no pass depends on an earlier one -----------------------------------------------------------


def _parameters_only(y: Tensor, x: Tensor, layer: nn.Module) -> None:
    grad(1000 * y.sum() + y.square().sum(), list(layer.parameters()), retain_graph=True)


def _input_only(y: Tensor, x: Tensor, layer: nn.Module) -> None:
    grad(7 * y.square().sum(), x, retain_graph=True)


def _with_graph(y: Tensor, x: Tensor, layer: nn.Module) -> None:
    grad(y.exp().sum(), x, create_graph=True)


def _parameters_with_graph(y: Tensor, x: Tensor, layer: nn.Module) -> None:
    grad(y.exp().sum(), list(layer.parameters()), create_graph=True)


def _interrupted(y: Tensor, x: Tensor, layer: nn.Module) -> None:
    def stop(dy: Tensor) -> None:
        raise KeyError("stop")

    handle = layer.weight.register_hook(stop)
    with pytest.raises(KeyError, match="stop"):
        grad(5 * y.exp().sum(), [layer.weight, x], retain_graph=True)
    handle.remove()


EARLIER = [_parameters_only, _input_only, _with_graph, _parameters_with_graph, _interrupted]


def _first_order(y: Tensor, x: Tensor, first: Tensor, layer: nn.Module) -> tuple[Tensor, ...]:
    return grad((y * x.detach().cos()).sum(), (x, *layer.parameters()), retain_graph=True)


def _second_order(y: Tensor, x: Tensor, first: Tensor, layer: nn.Module) -> tuple[Tensor, ...]:
    return grad(first.square().sum(), (x, layer.weight), retain_graph=True)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("last", [_first_order, _second_order])
@pytest.mark.parametrize("earlier", EARLIER)
def test_an_earlier_pass_leaves_nothing_behind(earlier: Callable[..., None], last: Callable[..., object]) -> None:
    stock, x = norm(SHAPES[1]), values(SHAPES[1])
    results = []
    for layer in (converted(stock), stock):
        y = layer(x)
        (first,) = grad((y * x.detach().sin()).sum(), x, create_graph=True)
        earlier(y, x, layer)
        results.append(last(y, x, first, layer))
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("path")
def test_two_backward_passes_add_up() -> None:
    layer, x = converted(norm(SHAPES[1])), values(SHAPES[1])
    loss = layer(x).square().sum()
    loss.backward(retain_graph=True)
    once = x.grad.clone(), layer.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close((x.grad, layer.weight.grad), (2 * once[0], 2 * once[1]))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.usefixtures("path")
def test_two_forwards_in_one_graph() -> None:
    stock, inputs = norm(SHAPES[1]), batches(SHAPES[1], 2, dtype=torch.float64)
    results = []
    for layer in (converted(stock), stock):
        xs = [x.clone().requires_grad_() for x in inputs]
        a, b = (layer(x) for x in xs)
        results.append(grad((a * b.exp()).sum(), (*xs, *layer.parameters())))
    torch.testing.assert_close(*results)


# --- what the graph keeps ------------------------------------------------------------------------


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("away", [lambda layer: None, distnorm.revert], ids=["layer is gone", "layer is reverted"])
def test_backward_outlives_the_layer(away: Callable[[nn.Module], object]) -> None:
    stock, x = norm(SHAPES[1]), values(SHAPES[1])
    layer = converted(stock)
    y = layer(x)
    away(layer)
    del layer
    gc.collect()
    torch.testing.assert_close(grad(y.exp().sum(), x), grad(stock(x).exp().sum(), x))


def test_a_graph_never_finds_the_channel_of_a_later_layer() -> None:
    keys = [converted(nn.BatchNorm2d(3))._site.key for _ in range(50)]  # each layer is gone when the next one comes
    assert len(set(keys)) == 50


@pytest.mark.usefixtures("path")
def test_the_input_is_freed_with_the_graph() -> None:
    layer, x = converted(norm(SHAPES[1])), values(SHAPES[1])
    gc.collect()
    gc.disable()
    try:
        inner = x * 2
        freed: list[bool] = []
        memory = StorageWeakRef(inner.untyped_storage())
        y = layer(inner)
        del inner
        freed.append(memory.expired())
        y.sum().backward()
        freed.append(memory.expired())
    finally:
        gc.enable()
    assert freed == [False, True]


@pytest.mark.usefixtures("path")
def test_saved_tensors_can_be_kept_elsewhere() -> None:
    layer, x = converted(norm(SHAPES[1])), values(SHAPES[1])
    expected = grad(layer(x).exp().sum(), (x, layer.weight))
    with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept.detach().numpy().copy(), torch.from_numpy):
        y = layer(x)
    assert all(map(torch.equal, grad(y.exp().sum(), (x, layer.weight)), expected))


@pytest.mark.usefixtures("path")
def test_an_input_changed_in_place_is_an_error() -> None:
    layer, x = converted(norm(SHAPES[1])), values(SHAPES[1])
    inner = x * 2
    y = layer(inner)
    inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_output_changed_in_place_is_fine() -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), worn(nn.BatchNorm2d(4)), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    stock.double()
    inputs = batches((4, 3, 5, 5), dtype=torch.float64)
    same(train(converted(stock), inputs), train(stock, inputs))


@pytest.mark.usefixtures("path")
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_anomaly_mode() -> None:
    layer, x = converted(norm(SHAPES[1])), values(SHAPES[1])
    expected = grad(layer(x).exp().sum(), (x, layer.weight))
    with torch.autograd.detect_anomaly():
        torch.testing.assert_close(grad(layer(x).exp().sum(), (x, layer.weight)), expected)


def test_a_forward_raises_before_it_changes_the_running_statistics() -> None:
    layer = converted(norm((5, 3)))
    before = layer.running_mean.clone()
    with pytest.raises(ValueError, match="1 value per channel"):
        layer(values((1, 3)))
    assert torch.equal(layer.running_mean, before) and layer.num_batches_tracked == 0
