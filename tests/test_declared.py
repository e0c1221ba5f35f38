"""What methods declare, beside the parameters and buffers of batch norm: in copies, checkpoints, optimizers and DDP."""

from __future__ import annotations

import copy
import logging
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import pytest
import torch
from torch import Tensor, nn

import distnorm
from distnorm import Recipe
from distnorm.layers.running_statistics import buffers_of
from distnorm.layers.untrained import adopt, groups_of
from distnorm.methods import Declared, Layer, Method, Share, Shared
from distnorm.policies import AllReduce, Local
from tests.support.threads import run_threads
from tests.test_methods import OFFSET
from tests.tilted import Gated, Peaked, Tilted

TILTED = Recipe(method=Tilted(), policy=AllReduce())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))


def step(model: nn.Module, *inputs: Tensor, seed: int = 0) -> Tensor:
    x = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(seed))
    y: Tensor = model(x, *inputs)
    y.square().mean().backward()
    return y.detach()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_go_on_alike(copied):
    model = distnorm.convert(network(), TILTED)
    step(model)
    other = copied(model)
    model.zero_grad(), other.zero_grad()
    for seed in (1, 2):
        torch.testing.assert_close(step(other, seed=seed), step(model, seed=seed), rtol=0, atol=0)
    found, wanted = ([*each.state_dict().values(), *(p.grad for p in each.parameters())] for each in (other, model))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_stock_checkpoint_starts_what_it_lacks(caplog):
    model = distnorm.convert(network(), TILTED)
    step(model)
    with torch.no_grad():
        model[1].slope.zero_()
    with caplog.at_level(logging.INFO, logger="distnorm"):
        model.load_state_dict(network().state_dict(), strict=True)
    assert len([each for each in caplog.records if "slope, level" in each.message]) == 1
    fresh = distnorm.convert(network(), TILTED)
    torch.testing.assert_close(list(model.state_dict().values()), list(fresh.state_dict().values()), rtol=0, atol=0)


def test_a_checkpoint_that_lacks_a_part_is_no_stock_one():
    model = distnorm.convert(network(), TILTED)
    state = model.state_dict()
    del state["1.slope"]
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.slope"):
        model.load_state_dict(state)


def test_state_dict_round_trip_and_reset():
    model, other = (distnorm.convert(network(), TILTED) for _ in range(2))
    start = copy.deepcopy(model.state_dict())
    step(model)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(list(other.state_dict().values()), list(model.state_dict().values()), rtol=0, atol=0)
    with torch.no_grad():
        model[1].slope.zero_()
    model[1].reset_parameters()
    for name in ("slope", "level", "running_mean", "running_var", "weight"):
        torch.testing.assert_close(model.state_dict()[f"1.{name}"], start[f"1.{name}"], rtol=0, atol=0)


def test_half_precision_keeps_buffers_wide():
    layer = distnorm.convert(nn.BatchNorm1d(3), TILTED).bfloat16()
    assert layer.slope.dtype is torch.bfloat16 and layer.level.dtype is torch.float32
    late = distnorm.convert(nn.BatchNorm1d(3).bfloat16(), TILTED)
    assert late.slope.dtype is torch.bfloat16 and late.level.dtype is torch.float32


def test_autocast():
    model = distnorm.convert(network(), TILTED)
    with torch.autocast("cpu", torch.bfloat16):
        found = step(model)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.float(), step(distnorm.convert(network(), TILTED)), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("named", [False, True])
def test_attach_adds_parameters_to_the_group_of_the_weight(named):
    model = network()
    given = (lambda each: each.named_parameters()) if named else (lambda each: each.parameters())
    groups = [{"params": list(given(model[0])), "lr": 1.0}, {"params": list(given(model[1:])), "lr": 0.5}]
    optimizer = torch.optim.SGD(groups)
    distnorm.convert(model, TILTED)
    for _ in range(2):
        distnorm.attach(model, optimizer=optimizer)
    found = optimizer.param_groups[1]["params"]
    assert sum(each is model[1].slope for each in found) == sum(each is model[4].slope for each in found) == 1
    before = model[1].slope.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model)
        optimizer.step()
    torch.testing.assert_close(model[1].slope, before - 0.5 * model[1].slope.grad)


@pytest.mark.parametrize("kind", ["iterator", "list", "groups", "groups of iterators", "nothing"])
def test_parameters_for_an_optimizer_that_is_built_later(kind):
    """As DeepSpeed is given them, before its section converts the model."""
    model = network()
    parameters = {
        "iterator": model.parameters(),
        "list": list(model.parameters()),
        "groups": [{"params": list(model[0].parameters())}, {"params": list(model[1:].parameters()), "lr": 1.0}],
        "groups of iterators": [{"params": model.parameters()}],
        "nothing": None,
    }[kind]
    distnorm.convert(model, TILTED)
    adopt(model, groups_of(None, parameters))
    if parameters is not None:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        assert {id(each) for each in optimizer.param_groups[-1]["params"]} >= {id(model[1].slope), id(model[4].slope)}


def test_another_optimizer_gets_only_what_is_its_own():
    model = distnorm.convert(network(), TILTED)
    optimizer = torch.optim.SGD([*model[0].parameters(), model[1].weight], lr=1.0)
    distnorm.attach(model, optimizer=optimizer)
    found = optimizer.param_groups[0]["params"]
    assert any(each is model[1].slope for each in found) and not any(each is model[4].slope for each in found)


def test_an_optimizer_from_before_warns_once():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    distnorm.convert(model, TILTED)
    step(model)
    with pytest.warns(UserWarning, match=r"SGD does not train 1\.slope, 4\.slope.*attach"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_ranks_begin_with_the_buffers_of_the_first():
    def run(rank: int) -> Tensor:
        layer = distnorm.convert(nn.BatchNorm1d(3), TILTED)
        layer.level.fill_(rank + 1.0)
        distnorm.attach(layer)
        assert buffers_of(layer)[-1] == "level"  # DDP stops its broadcasts of these
        return layer.level.clone()

    assert [each.tolist() for each in run_threads(2, run)] == [[1.0] * 3] * 2


def test_sync_running_stats_averages_buffers():
    def run(rank: int) -> Tensor:
        layer = distnorm.convert(nn.BatchNorm1d(3), Recipe(method=Tilted(), policy=Local()))
        distnorm.attach(layer)
        layer.level.fill_(rank + 1.0)
        distnorm.sync_running_stats(layer)
        return layer.level.clone()

    assert [each.tolist() for each in run_threads(2, run)] == [[1.5] * 3] * 2


@pytest.mark.parametrize("given", [0, 2])
def test_inputs_are_counted(given):
    layer = distnorm.convert(nn.BatchNorm1d(3), Recipe(method=Peaked(), policy=Local()))
    with pytest.raises(
        TypeError, match=rf"BatchNorm1d: given {1 + given} inputs; Peaked\(\) takes 2 \(input, offset\)"
    ):
        layer(torch.zeros(2, 3), *[OFFSET] * given)


def test_an_input_for_a_method_that_takes_none():
    layer = distnorm.convert(nn.BatchNorm1d(3), "sync_bn")
    with pytest.raises(TypeError, match=r"takes 1 \(input\)\. A residual is given by name"):
        layer(torch.zeros(2, 3), torch.zeros(2, 3))


@final
@dataclass(frozen=True, kw_only=True)
class Broken(Method):
    """A method with one of several faults."""

    fault: str

    def check(self, features: int) -> None:
        if self.fault == "features":
            raise ValueError(f"3 groups do not divide {features} features")

    def declare(self, features: int) -> Declared:
        step = {"step": torch.tensor(0)}
        buffers = {"0-d": {**step, "level": torch.tensor(1.0)}, "0-d double": {"x": torch.ones(()).double()}}
        parameters = {"weight": torch.ones(features)} if self.fault == "taken" else {}
        return Declared(parameters, step if self.fault == "none" else buffers.get(self.fault, {}))

    def normalize(self, x_NCL: Tensor, share: Share, layer: Layer, *inputs: Tensor) -> Tensor:
        sums = x_NCL.double().transpose(0, 1).flatten(1).sum(1)
        for _ in range(2 if self.fault == "twice" else 1):
            share(sums, 1.0, op="max" if self.fault == "max" else "sum")
        return x_NCL

    def evaluate(self, x_NCL: Tensor, layer: Layer, *inputs: Tensor) -> Tensor:
        return x_NCL

    def targets(self, shared: Mapping[str, Shared], layer: Layer) -> Mapping[str, Tensor]:
        return {
            "unknown" if self.fault == "unknown" else "running_mean": torch.zeros(2 if self.fault == "shape" else 4)
        }


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("features", "0: 3 groups do not divide 4 features"),
        ("taken", "0: BatchNorm1d has an attribute 'weight' already"),
        ("0-d", r"0: Broken.*buffer 'level' without dimensions.*torch\.compile.*shape \[1\]"),
        ("0-d double", "0: Broken.*buffer 'x' without dimensions"),
        ("twice", "0: Broken.*shares twice by the name ''"),
        ("max", "0: Broken.*needs_max"),
        ("unknown", "0: Broken.*buffer 'unknown'.*running_mean"),
        ("shape", r"0: Broken.*shape \[2\] for buffer 'running_mean'"),
    ],
)
def test_faults_of_methods_are_found_by_convert(fault, text):
    model = nn.Sequential(nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=text):
        distnorm.convert(model, Recipe(method=Broken(fault=fault), policy=Local()))
    assert type(model[0]) is nn.BatchNorm1d and set(model.state_dict()) == set(
        nn.Sequential(nn.BatchNorm1d(4)).state_dict()
    )


def test_whole_numbers_need_no_dimensions() -> None:
    model = distnorm.convert(nn.Sequential(nn.BatchNorm1d(4)), Recipe(method=Broken(fault="none"), policy=Local()))
    assert model[0].step.shape == ()


def test_export_of_evaluation():
    model = distnorm.convert(network(), Recipe(method=Gated(), policy=AllReduce())).eval()
    x = torch.randn(4, 2, 5, 5)
    exported: Any = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))
