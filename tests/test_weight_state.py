"""Standardized and normalized weights beside optimizers, checkpoints, copies and tools; and plain layers again."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune

import distnorm
from distnorm.layers import weights
from distnorm.layers.reweighted import Reweighted
from tests.training import same
from tests.weighted import (
    EVERY_KIND,
    FEEDERS,
    Net,
    evaluated,
    formula,
    layers,
    names,
    net,
    places,
    train,
)

EVERY_COPY = pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])


def test_gains_that_no_optimizer_has() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    distnorm.convert(model, "local_bn", weights="normalized")
    before = model.stem.gain.detach().clone()
    with pytest.warns(UserWarning, match=r"SGD does not train .*stem\.gain.*attach"):
        train(model, optimizer=optimizer)
    torch.testing.assert_close(model.stem.gain.detach(), before, rtol=0, atol=0)
    distnorm.attach(model, optimizer=optimizer)
    stepped = {id(each) for each in optimizer.param_groups[0]["params"]}
    assert all({id(weight), id(gain)} <= stepped for weight, gain in weights.added_parameters(model))
    train(model, optimizer=optimizer)
    assert not torch.equal(model.stem.gain, before)
    baked = copy.deepcopy(model).eval()
    distnorm.revert(baked)
    torch.testing.assert_close(baked.stem.weight.flatten(1).norm(dim=1), model.stem.gain.abs())


def test_a_model_that_ddp_holds_is_too_late_for_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    class Held(DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    model = net()
    with pytest.raises(ValueError, match=r"^module.stem: weights='normalized' adds .*DistributedDataParallel"):
        distnorm.convert(Held(model), "sync_bn", weights="normalized")
    assert {type(each) for each in model.modules()} == {type(each) for each in net().modules()}
    distnorm.convert(Held(model), "sync_bn", weights="standardized")


@EVERY_KIND
def test_revert_bakes_and_training_goes_on(kind: str) -> None:
    model = distnorm.convert(net(), "local_bn", weights=kind)
    train(model)
    if kind == "normalized":
        with torch.no_grad():
            model.stem.gain[1] *= -1
    y, kept = evaluated(model), {name: model.get_submodule(name).weight for name in FEEDERS}
    expected = {name: formula(kind, layer, getattr(layer, "gain", None)) for name, layer in layers(model)}
    distnorm.revert(model)
    torch.testing.assert_close(evaluated(model), y)
    assert [type(each) for each in model.modules()] == [type(each) for each in net().modules()]
    assert list(model.state_dict()) == list(net().state_dict())
    for name, weight in kept.items():
        assert model.get_submodule(name).weight is weight
        torch.testing.assert_close(weight.detach(), expected[name])
    assert not set(vars(model.stem)) - set(vars(net().stem))
    assert train(model)
    distnorm.convert(model, "sync_bn", weights=kind)
    assert names(model) == FEEDERS


@EVERY_KIND
def test_undo_leaves_the_parameters(kind: str) -> None:
    model = distnorm.convert(net(), "local_bn", weights=kind)
    same(dict(distnorm.convert.__globals__["undo"](model).state_dict()), dict(net().state_dict()), exactly=True)


@EVERY_KIND
@EVERY_COPY
def test_copies_go_on_alike(kind: str, way: Callable[[nn.Module], nn.Module]) -> None:
    model = distnorm.convert(net(), "local_bn", weights=kind)
    train(model)
    copied = way(model)
    assert names(copied) == FEEDERS and copied.stem.weight is not model.stem.weight
    torch.testing.assert_close(evaluated(copied), evaluated(model), rtol=0, atol=0)
    torch.testing.assert_close(train(copied), train(model), rtol=0, atol=0)
    torch.testing.assert_close(evaluated(distnorm.revert(copied)), evaluated(model))


def saved(model: nn.Module) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


@EVERY_KIND
def test_checkpoints_hold_the_parameters(kind: str) -> None:
    model = distnorm.convert(net(), "local_bn", weights=kind)
    train(model)
    state = saved(model)
    for name, layer in layers(model):
        assert torch.equal(state[f"{name}.weight"], layer.weight)
    fresh = distnorm.convert(net(), "local_bn", weights=kind)
    fresh.load_state_dict(state)
    torch.testing.assert_close(train(fresh), train(model), rtol=0, atol=0)
    stock = net()
    stock.load_state_dict(saved(distnorm.revert(model)))
    torch.testing.assert_close(evaluated(stock), evaluated(fresh))


@pytest.mark.parametrize("assign", [False, True])
def test_gains_for_a_checkpoint_of_the_stock_model(assign: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "distnorm")
    stock = net()
    train(stock)
    with torch.device("meta" if assign else "cpu"):
        model = Net()
    distnorm.convert(model.double(), "local_bn", weights="normalized")
    model.load_state_dict(stock.state_dict(), assign=assign)
    assert not any(value.is_meta for value in model.state_dict().values())
    torch.testing.assert_close(evaluated(model), evaluated(stock))
    assert len([record for record in caplog.records if "has no" in record.getMessage()]) == len(FEEDERS)
    with pytest.raises(RuntimeError, match=r"norm1\.weight"):
        model.load_state_dict({name: value for name, value in stock.state_dict().items() if name != "norm1.weight"})
    with pytest.raises(RuntimeError, match=r"stem\.gain"):
        net().load_state_dict(model.state_dict())


def test_meta_layers_that_are_initialized_later() -> None:
    with torch.device("meta"):
        model = Net()
    distnorm.convert(model, "local_bn", weights="normalized")
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for _, layer in layers(model):
        expected = torch.stack([layer.weight.detach()[place].norm() for place in places(layer)])
        torch.testing.assert_close(layer.gain.detach(), expected)


@EVERY_KIND
def test_a_tool_that_is_put_on_later(kind: str) -> None:
    """It computes the parameter, from which the layer computes its weight; so revert needs it off again."""
    model = distnorm.convert(net(), "local_bn", weights=kind)
    prune.l1_unstructured(model.stem, "weight", 0.3)
    y = evaluated(model)
    with pytest.raises(RuntimeError, match=r"^stem: the weight is computed from other parameters .*prune.remove"):
        distnorm.revert(model)
    assert names(model) == FEEDERS
    torch.testing.assert_close(evaluated(model), y, rtol=0, atol=0)
    prune.remove(model.stem, "weight")
    parametrizations.orthogonal(model.line)
    y = evaluated(model)
    with pytest.raises(RuntimeError, match=r"^line: .*remove_parametrizations"):
        distnorm.revert(model)
    parametrize.remove_parametrizations(model.line, "weight")
    torch.testing.assert_close(evaluated(distnorm.revert(model)), y)


@EVERY_KIND
def test_a_tool_on_the_bias_does_not_matter(kind: str) -> None:
    class Doubled(nn.Module):
        def forward(self, bias: Tensor) -> Tensor:
            return 2 * bias

    model = net()
    parametrize.register_parametrization(model.up, "bias", Doubled())
    distnorm.convert(model, "local_bn", weights=kind)
    assert names(model) == FEEDERS
    train(model)
    y = evaluated(model)
    torch.testing.assert_close(evaluated(distnorm.revert(model)), y)
    assert type(model.up).__bases__ == (nn.ConvTranspose2d,) and not isinstance(model.up, Reweighted)


@EVERY_KIND
def test_a_partitioned_weight_is_not_baked(kind: str) -> None:
    model = distnorm.convert(net(), "local_bn", weights=kind)
    model.up.weight.data = torch.empty(0, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"^up: an engine has partitioned the weight"):
        distnorm.revert(model)
    assert names(model) == FEEDERS
