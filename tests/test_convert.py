"""Conversion: which layers change, what stays, and what the errors say."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import distnorm
from distnorm.layers.module import DistBatchNorm1d, DistBatchNorm2d, DistBatchNorm3d, DistNorm, DistSyncBatchNorm
from distnorm.methods import RMS, BatchNorm
from distnorm.policies import AllReduce
from distnorm.recipe import Recipe
from tests.training import batches, converted, made, same, train, worn

LAYERS = [
    pytest.param(nn.BatchNorm1d, (6, 4), id="1d-NC"),
    pytest.param(nn.BatchNorm1d, (6, 4, 5), id="1d-NCL"),
    pytest.param(nn.BatchNorm2d, (6, 4, 3, 2), id="2d"),
    pytest.param(nn.BatchNorm3d, (5, 4, 2, 3, 2), id="3d"),
    pytest.param(nn.SyncBatchNorm, (6, 4, 3), id="sync"),
]
OPTIONS = [
    {},
    {"affine": False},
    {"bias": False},
    {"momentum": None},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"momentum": 0.3, "eps": 1e-2},
]


class Net(nn.Module):
    """Three batch norms, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), worn(nn.BatchNorm2d(4)), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), worn(nn.BatchNorm2d(4)))
        self.again = nn.ModuleList([self.body[1]])
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), worn(nn.BatchNorm1d(5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again[0](self.body(self.stem(x)).relu()))


class Gated(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sigmoid()


class DistGated(DistBatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).sigmoid()


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def gated_is_known() -> Iterator[None]:
    targets = importlib.import_module("distnorm.convert")._targets
    distnorm.register_converter(Gated, DistGated)
    yield
    del targets[Gated]


def layout(model: nn.Module) -> dict[str, tuple[type, list[str]]]:
    return {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()}


def converted_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, DistNorm)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("kind", "shape"), LAYERS)
def test_a_layer_trains_as_stock(kind: type[nn.Module], shape: tuple[int, ...], options: dict[str, object]) -> None:
    stock = made(kind, 4, **options)
    inputs = batches(shape)
    same(train(converted(stock), inputs), train(stock, inputs))


def test_a_model_trains_as_stock(net: Net) -> None:
    inputs = batches((8, 3, 6, 6))
    same(train(converted(net), inputs), train(net, inputs))


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_model_with_a_frozen_layer_trains_as_stock(frozen: int) -> None:
    """A layer that ran before the layers were bound has saved its running statistics for backward."""
    torch.manual_seed(0)
    stock = nn.Sequential(*(worn(nn.BatchNorm2d(3)) for _ in range(3))).double()
    mine, inputs = converted(stock), batches((8, 3, 6, 6), dtype=torch.float64)
    for each in (mine, stock):
        each[frozen].eval()
    for x in inputs:
        gradients = []
        for each in (mine, stock):
            each.zero_grad()
            each(x).square().sum().backward()
            gradients.append([parameter.grad for parameter in each.parameters()])
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (nn.BatchNorm1d, DistBatchNorm1d),
        (nn.BatchNorm2d, DistBatchNorm2d),
        (nn.BatchNorm3d, DistBatchNorm3d),
        (nn.SyncBatchNorm, DistSyncBatchNorm),
    ],
)
def test_the_class_is_swapped_in_place(source: type[nn.Module], target: type[nn.Module]) -> None:
    layer = source(4)
    assert distnorm.convert(layer, "sync_bn") is layer
    assert type(layer) is target
    assert isinstance(layer, source) or source is nn.SyncBatchNorm
    assert layer._site.name == source.__name__


def test_a_shared_layer_is_converted_once(net: Net) -> None:
    distnorm.convert(net, "sync_bn")
    assert net.again[0] is net.body[1]
    assert [name for name, _ in net.body[1]._site.conversion.layers()] == ["stem.1", "body.1", "head.2"]


def test_a_layer_called_twice_per_forward() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = worn(nn.BatchNorm2d(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x).relu() + x)

    stock, inputs = Twice(), batches((4, 3, 2, 3))
    mine = converted(stock)
    same(train(mine, inputs), train(stock, inputs))
    assert mine.norm.num_batches_tracked == 2 * len(inputs)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_an_uninitialized_lazy_layer_is_named_and_nothing_changes() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d())
    before = layout(model)
    with pytest.raises(ValueError, match=r"^2: LazyBatchNorm2d is not initialized. Run one forward pass"):
        distnorm.convert(model, "sync_bn")
    assert layout(model) == before


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_an_initialized_lazy_layer_converts() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d())
    inputs = batches((4, 3, 2, 2))
    model(inputs[0])
    mine = converted(model)
    assert type(mine[1]) is DistBatchNorm2d
    same(train(mine, inputs), train(model, inputs))


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (lambda name, layer: layer.num_features == 5, ["head.2"]),
        (lambda name, layer: not name.startswith("head"), ["stem.1", "body.1"]),
        ("*.1", ["stem.1", "body.1"]),
        (["stem.*", "head.?"], ["stem.1", "head.2"]),
        (("body.1",), ["body.1"]),
        ("*", ["stem.1", "body.1", "head.2"]),
    ],
)
def test_where(net: Net, where: object, expected: list[str]) -> None:
    assert converted_names(distnorm.convert(net, "sync_bn", where=where)) == expected


@pytest.mark.parametrize("where", [lambda name, layer: False, "stem", [], ["STEM.*"]])
def test_where_that_selects_nothing_is_an_error(net: Net, where: object) -> None:
    before = layout(net)
    with pytest.raises(ValueError, match=r"selects none of \['stem.1', 'body.1', 'head.2'\]"):
        distnorm.convert(net, "sync_bn", where=where)
    assert layout(net) == before


def test_converting_twice_changes_nothing(net: Net) -> None:
    distnorm.convert(net, "sync_bn")
    sites = [layer._site for layer in net.modules() if isinstance(layer, DistNorm)]
    before = layout(net)
    distnorm.convert(net, Recipe(method=BatchNorm(), policy=AllReduce()))
    assert [layer._site for layer in net.modules() if isinstance(layer, DistNorm)] == sites
    assert layout(net) == before


def test_converting_the_rest_leaves_the_first_alone(net: Net) -> None:
    first = distnorm.convert(net, "sync_bn", where="stem.*").stem[1]._site
    distnorm.convert(net, "sync_bn")
    assert net.stem[1]._site is first
    assert net.head[2]._site.conversion is not first.conversion


def test_another_recipe_for_a_converted_layer_is_an_error(net: Net) -> None:
    distnorm.convert(net, "sync_bn", where="body.*")
    before = layout(net)
    with pytest.raises(ValueError, match=r"^body.1: already converted to .*BatchNorm\(\).*distnorm.revert\(model\)"):
        distnorm.convert(net, Recipe(method=RMS(), policy=AllReduce()))
    assert layout(net) == before
    distnorm.convert(net, "local_bn", where="stem.*")  # a recipe per part of the model is fine
    assert net.stem[1].recipe != net.body[1].recipe


@pytest.mark.usefixtures("gated_is_known")
def test_a_registered_subclass_keeps_its_activation() -> None:
    stock = nn.Sequential(worn(Gated(3)), worn(nn.BatchNorm2d(3)))
    mine, inputs = converted(stock), batches((4, 3, 2, 2))
    assert type(mine[0]) is DistGated
    same(train(mine, inputs), train(stock, inputs))
    assert distnorm.convert(mine, "sync_bn") is mine
    assert type(distnorm.revert(mine)[0]) is Gated


@pytest.mark.parametrize(
    ("source", "target"), [(nn.Linear, DistBatchNorm2d), (Gated, Gated), (Gated(3), DistBatchNorm2d)]
)
def test_register_converter_refuses(source: type, target: type) -> None:
    with pytest.raises(TypeError, match=r"register_converter\((source|target)="):
        distnorm.register_converter(source, target)


def test_identities_are_kept(net: Net) -> None:
    calls: list[str] = []
    net.head[2].register_forward_hook(lambda *_: calls.append("forward"))
    net.head[2].register_forward_pre_hook(lambda *_: calls.append("before"))
    net.head[2].register_full_backward_hook(lambda *_: calls.append("backward"))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = {name: id(value) for name, value in net.state_dict(keep_vars=True).items()}
    weight = net.stem[1].weight.detach().clone()
    distnorm.convert(net, "sync_bn")
    assert {name: id(value) for name, value in net.state_dict(keep_vars=True).items()} == before
    net(batches((8, 3, 6, 6))[0]).square().sum().backward()
    optimizer.step()
    assert calls == ["before", "forward", "backward"]
    assert not torch.equal(net.stem[1].weight, weight)


def test_the_state_dict_goes_both_ways(net: Net) -> None:
    mine = converted(net)
    train(mine, batches((8, 3, 6, 6)))
    assert list(mine.state_dict()) == list(net.state_dict())
    net.load_state_dict(mine.state_dict(), strict=True)
    other = distnorm.convert(Net(), "sync_bn")
    other.load_state_dict(net.state_dict(), strict=True)
    for key, value in mine.state_dict().items():
        assert torch.equal(other.state_dict()[key], value), key


def test_a_model_without_batch_norm_warns_and_stays() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2))
    before = layout(model)
    with pytest.warns(UserWarning, match="Sequential has no batch norm layer") as caught:
        distnorm.convert(model, "sync_bn")
    assert (len(caught), caught[0].filename) == (1, __file__)
    assert layout(model) == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: distnorm.convert(net, BatchNorm()), "need a Recipe or the name of one"),
        (lambda net: distnorm.convert(net, "sync_pn"), "did you mean 'sync_bn'"),
        (lambda net: distnorm.convert(net, "group_bn", sizes=2), "did you mean 'size'"),
        (
            lambda net: distnorm.convert(net, Recipe(method=BatchNorm(), policy=AllReduce()), size=2),
            r"options \['size'\] are allowed with the name of a recipe only",
        ),
        (distnorm.attach, "no converted layer"),
        (distnorm.sync_running_stats, "no converted layer"),
    ],
)
def test_a_bad_call_changes_nothing(net: Net, call: Callable[[Net], object], message: str) -> None:
    before = layout(net)
    with pytest.raises(ValueError, match=message):
        call(net)
    assert layout(net) == before


def test_conversion_neither_warns_nor_draws_random_numbers(net: Net) -> None:
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distnorm.revert(distnorm.convert(copy.deepcopy(net), "sync_bn"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("stock", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
@pytest.mark.parametrize("recipe", ["sync_bn", "local_bn", "mabn"])
def test_class_names_carry_the_stock_name(recipe: str, stock: type[nn.Module]) -> None:
    """Initialization and weight-decay filters of public code look for it."""
    layer = distnorm.convert(nn.Sequential(stock(3)), recipe)[0]
    assert stock.__name__ in type(layer).__name__
    assert stock.__name__ in repr(layer)
