"""Parameters that tools compute: parametrizations, weight_norm, spectral_norm and prune, on norms and convolutions.

Every case is compared with a stock model to which the same was done.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import distnorm
from distnorm.layers.class_swap import swap, underlying
from distnorm.layers.module import DistBatchNorm2d, DistNorm
from tests.training import batches, same, train, worn

X = batches((6, 3, 7, 6), dtype=torch.float64)

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def twice(layer: nn.Module) -> None:
    for name in ("weight", "bias"):
        parametrize.register_parametrization(layer, name, Doubled())


def plain_again(layer: nn.Module) -> None:
    for name in list(layer.parametrizations):
        parametrize.remove_parametrizations(layer, name)


def seeded(tool: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
    def put(layer: nn.Module) -> None:
        torch.manual_seed(3)
        tool(layer)

    return put


class Tool(NamedTuple):
    put: Callable[[nn.Module], Any]
    take: Callable[[nn.Module], Any]


TOOLS = {
    "parametrizations": Tool(twice, plain_again),
    "weight_norm": Tool(parametrizations.weight_norm, plain_again),
    "spectral_norm": Tool(seeded(parametrizations.spectral_norm), plain_again),
    "old weight_norm": Tool(utils.weight_norm, utils.remove_weight_norm),
    "old spectral_norm": Tool(seeded(utils.spectral_norm), utils.remove_spectral_norm),
    "prune": Tool(
        seeded(lambda layer: prune.random_unstructured(layer, "weight", 0.5)),
        lambda layer: prune.remove(layer, "weight"),
    ),
}
EVERY_TOOL = pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
ORDERS = pytest.mark.parametrize("order", ["before", "after"])
PLACES = pytest.mark.parametrize("at", [1, 3], ids=["norm", "convolution"])
OPTIONS = pytest.mark.parametrize("options", [{}, {"fuse": True}, {"overlap": True}], ids=["", "fuse", "overlap"])


def stock() -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 4, 3), worn(nn.BatchNorm2d(4)), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv2d(4, 4, 1), worn(nn.BatchNorm2d(4)), nn.ReLU()).double()


def both(tool: Tool, at: int, order: str, options: dict[str, Any]) -> tuple[nn.Sequential, nn.Sequential]:
    """A converted and a stock model, on which ``tool`` was used."""
    mine, other = stock(), stock()
    tool.put(other[at])
    if order == "before":
        tool.put(mine[at])
    distnorm.convert(mine, "sync_bn", **options)
    if order == "after":
        tool.put(mine[at])
    return mine, other


@EVERY_TOOL
@PLACES
@ORDERS
@OPTIONS
def test_training_casting_loading_and_reverting(tool: Tool, at: int, order: str, options: dict[str, Any]) -> None:
    mine, other = both(tool, at, order, options)
    assert sum(isinstance(each, DistNorm) for each in mine.modules()) == 2
    same(train(mine, X), train(other, X))
    state = {name: value.clone() for name, value in other.state_dict().items()}
    assert mine.state_dict().keys() == state.keys()
    mine.load_state_dict(state)
    for each in (mine, other):
        each.float().double()
    same(train(distnorm.revert(mine), X), train(other, X))
    for each in (mine, other):
        tool.take(each[at])
    same(train(mine, X), train(other, X))
    assert [type(each) for each in mine.modules()] == [type(each) for each in stock().modules()]


@EVERY_TOOL
@PLACES
@ORDERS
@OPTIONS
def test_taking_the_tool_off_first(tool: Tool, at: int, order: str, options: dict[str, Any]) -> None:
    mine, other = both(tool, at, order, options)
    for each in (mine, other):
        train(each, X)
        tool.take(each[at])
    same(train(mine, X), train(other, X))
    same(train(distnorm.revert(mine), X), train(other, X))
    assert [type(each) for each in mine.modules()] == [type(each) for each in stock().modules()]


@pytest.mark.parametrize("tool", [*TOOLS.values()][:3], ids=[*TOOLS][:3])
@PLACES
@ORDERS
def test_copies_are_registered_and_train(tool: Tool, at: int, order: str) -> None:
    mine, other = both(tool, at, order, {})
    copied = copy.deepcopy(mine)
    conversion = copied[1]._site.conversion
    assert [layer for _, layer in conversion.layers()] == [copied[1], copied[4]]
    assert conversion is not mine[1]._site.conversion
    same(train(copied, X), train(other, X))
    assert type(distnorm.revert(copied)[4]) is nn.BatchNorm2d


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_every_kind_of_norm_is_known_under_a_parametrization(kind: type[nn.Module]) -> None:
    layer = kind(4)
    twice(layer)
    made = type(layer)
    assert isinstance(distnorm.convert(nn.Sequential(layer), "local_bn")[0], DistNorm)
    distnorm.revert(layer)
    assert underlying(layer) is kind and type(layer).__name__ == made.__name__ and type(layer).__bases__ == (kind,)
    model = distnorm.nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer))
    assert isinstance(model[0], distnorm.nn.SyncBatchNorm)


def test_classes_on_classes_are_made_again_in_order() -> None:
    """As when FSDP2 shards what is parametrized."""
    layer = nn.BatchNorm2d(4)
    twice(layer)
    inner = type(layer)
    on_top = {"__module__": "torch.distributed.fsdp", "shards": True}
    layer.__class__ = type(f"FSDP{inner.__name__}", (Mixed, inner), on_top)
    assert underlying(layer) is nn.BatchNorm2d
    swap(layer, DistBatchNorm2d)
    names = ["FSDPParametrizedDistBatchNorm2d", "Mixed", "ParametrizedDistBatchNorm2d", "DistBatchNorm2d"]
    assert [cls.__name__ for cls in type(layer).__mro__[:4]] == names
    swap(layer, nn.BatchNorm2d)
    assert layer.shards and torch.equal(layer.weight, torch.ones(4))
    assert underlying(layer) is nn.BatchNorm2d and type(layer).__bases__[1].__bases__ == (nn.BatchNorm2d,)


class Mixed:
    """Stands for FSDPModule."""
