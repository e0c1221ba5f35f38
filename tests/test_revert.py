"""Taking a recipe out again: the model is a stock model, as if it had never been converted."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import distnorm
from tests.training import batches, converted, same, train, worn


def model(kind: type[nn.Module] = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), worn(kind(4)), nn.Sequential(nn.ReLU(), worn(kind(4))))


def attributes(module: nn.Module) -> dict[str, list[str]]:
    return {name: sorted(vars(each)) for name, each in module.named_modules()}


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.SyncBatchNorm])
def test_class_values_and_attributes_are_stock_again(kind: type[nn.Module]) -> None:
    stock, inputs = model(kind), batches((6, 3, 5, 5))
    mine = converted(stock)
    train(mine, inputs)
    y = mine.eval()(inputs[0])
    assert distnorm.revert(mine) is mine
    assert [type(each) for each in mine.modules()] == [type(each) for each in stock.modules()]
    assert attributes(mine) == attributes(stock)
    assert torch.equal(mine(inputs[0]), y)
    assert not any(isinstance(each, distnorm.DistNorm) for each in mine.modules())


@pytest.mark.parametrize("recipe", ["sync_bn", "local_bn", "periodic_bn"])
def test_training_goes_on_as_stock(recipe: str) -> None:
    stock, inputs = model(), batches((6, 3, 5, 5))
    mine = distnorm.revert(converted(stock, recipe))
    same(train(mine, inputs), train(stock, inputs), exactly=True)


def test_a_stock_model_is_left_alone() -> None:
    stock = model()
    before = attributes(stock)
    assert attributes(distnorm.revert(stock)) == before


def test_converting_again_with_another_recipe() -> None:
    mine = distnorm.revert(converted(model()))
    distnorm.convert(mine, "local_bn")
    assert mine[1].recipe.name == "local_bn"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_cast_in_between_evaluates_as_before(dtype: torch.dtype) -> None:
    mine, x = converted(model()).to(dtype).eval(), batches((6, 3, 5, 5), dtype=dtype)[0]
    y = mine(x)
    rounding = 4 * torch.finfo(dtype).eps  # stock running statistics have the dtype of the parameters
    torch.testing.assert_close(distnorm.revert(mine)(x), y, rtol=rounding, atol=rounding)


def test_parts_that_were_converted_on_their_own() -> None:
    mine = model()
    before = attributes(mine)
    distnorm.convert(mine[2], "sync_bn")
    distnorm.convert(mine, "sync_bn")
    assert attributes(distnorm.revert(mine)) == before


# --- what needs a stock model --------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_export_after_revert(mode: str) -> None:
    stock, x = model(), batches((6, 3, 5, 5))[0]
    mine = distnorm.revert(converted(stock))
    exported, expected = (torch.export.export(each.train(mode == "train"), (x,)) for each in (mine, stock))
    assert exported.graph_module.code == expected.graph_module.code
    assert torch.equal(exported.module()(x), expected.module()(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # torch 2.15
def test_script_after_revert() -> None:
    stock, x = model(), batches((6, 3, 5, 5))[0]
    mine = torch.jit.script(distnorm.revert(converted(stock)))
    assert torch.equal(mine(x), stock(x))
    assert torch.equal(mine.eval()(x), stock.eval()(x))
    assert torch.equal(mine.state_dict()["1.running_var"], stock.state_dict()["1.running_var"])


BEFORE_A_NORM = {
    "convolution": (lambda: nn.Conv2d(3, 4, 3), (6, 3, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 3), (6, 3, 5, 5)),
    "linear": (lambda: nn.Linear(3, 4), (6, 3)),
}


@pytest.mark.parametrize("before", BEFORE_A_NORM)
@pytest.mark.parametrize("recipe", ["sync_bn", "mabn"])
def test_what_has_wrapped_a_forward_calls_the_stock_one(recipe: str, before: str) -> None:
    """As offloading hooks do, which call the forward that they found."""
    make, shape = BEFORE_A_NORM[before]
    inputs = batches(shape)
    mine = converted(nn.Sequential(make(), worn(nn.BatchNorm2d(4) if len(shape) > 2 else nn.BatchNorm1d(4))), recipe)
    for each in mine.modules():
        each.forward = functools.partial(each.forward)  # type: ignore[method-assign]
    train(mine, inputs)
    y = mine.eval()(inputs[0])
    torch.testing.assert_close(distnorm.revert(mine)(inputs[0]), y)
    mine.train()(inputs[0]).sum().backward()


@pytest.mark.parametrize("recipe", ["sync_bn", "mabn"])
def test_a_momentum_that_was_set_since_stays(recipe: str) -> None:
    mine = converted(model(), recipe)
    mine[1].momentum = 0.5
    distnorm.revert(mine)
    assert mine[1].momentum == 0.5 and mine[2][1].momentum == 0.1
