"""Folding and reverting: evaluation does not change, or an error says why it would."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distnorm
from distnorm import DistNorm, Recipe
from distnorm.methods import RMS, BatchNorm, Layer, Method, Share
from distnorm.policies import AllReduce, Local
from tests.tilted import Gated, Tilted

METHODS = [BatchNorm(), RMS(), Tilted(), Gated()]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + x)


class Twice(nn.Module):
    """Neither the convolution, whose output goes elsewhere too, nor the norm that runs twice, can be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = (
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        z = self.conv2(self.bn1(y) + y)
        return self.bn2(self.bn2(z)) * self.conv2.weight.sum()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "sequential": (
        lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6)),
        (2, 4, 5, 5),
        1,
    ),
    "residual": (Residual, (2, 4, 5, 5), 2),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), (5, 4), 1),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, affine=False)),
        (2, 4, 5, 5),
        1,
    ),
    "grouped": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3, groups=4), nn.BatchNorm1d(8)), (2, 4, 5), 1),
    "elsewhere": (Twice, (2, 4, 5, 5), 0),
}


def trained(build: Callable[[], nn.Module], shape: tuple[int, ...], method: Method, **options: bool) -> nn.Module:
    torch.manual_seed(0)
    model = distnorm.convert(build(), Recipe(method=method, policy=AllReduce()), **options)
    for _ in range(3):
        model(torch.randn(shape)).square().sum().backward()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_folded_models_evaluate_alike(name, method):
    build, shape, count = MODELS[name]
    model = trained(build, shape, method)
    before = copy.deepcopy(model.state_dict())
    folded = distnorm.fold(model)
    x = torch.randn(shape)
    expected = model.eval()(x)
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
    kept = sum(isinstance(each, DistNorm) for each in folded.modules())
    gone = sum(isinstance(each, nn.Identity) for each in folded.modules())
    norms = sum(isinstance(each, DistNorm) for each in model.modules())
    assert (kept, gone) == ((norms, 0) if isinstance(method, Gated) else (0, count))
    torch.testing.assert_close(list(model.state_dict().values()), list(before.values()), rtol=0, atol=0)


def test_fused_and_centralized_models():
    torch.manual_seed(0)
    model = distnorm.convert(Residual(), Recipe(method=RMS(), policy=AllReduce(), weights="centralized"), fuse=True)
    x = torch.randn(2, 4, 5, 5)
    model(x).square().sum().backward()
    folded = distnorm.fold(model)
    torch.testing.assert_close(folded(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert not [each for each in folded.modules() if isinstance(each, nn.BatchNorm2d)]
    torch.jit.script(folded)


def test_a_linear_layer_before_a_norm_of_another_dimension():
    folded = distnorm.fold(distnorm.convert(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)), "sync_bn"))
    with pytest.raises(ValueError, match="2-D inputs only; given 3"):
        folded(torch.zeros(2, 6, 4))


def test_what_cannot_be_traced():
    class Branches(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    model = distnorm.convert(Branches(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), "sync_bn")
    with pytest.raises(RuntimeError, match=r"cannot trace Branches .*Fold the parts"):
        distnorm.fold(model)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_revert_writes_what_stock_evaluates_alike(affine, tracked):
    def build() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(4, affine=affine, track_running_stats=tracked))

    model = trained(build, (2, 4, 5, 5), Tilted())
    x = torch.randn(2, 4, 5, 5)
    model[0].running_mean = torch.zeros(4) if model[0].running_mean is None else model[0].running_mean
    model[0].running_var = torch.ones(4) if model[0].running_var is None else model[0].running_var
    expected = model.eval()(x)
    reverted = distnorm.revert(model)
    assert type(reverted[0]) is nn.BatchNorm2d and not hasattr(reverted[0], "slope")
    torch.testing.assert_close(reverted(x), expected, rtol=1e-5, atol=1e-5)


def test_revert_refuses_what_torch_does_not_have():
    model = distnorm.convert(
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), Recipe(method=Gated(), policy=Local())
    )
    with pytest.raises(RuntimeError, match=r"1: no module of torch computes what Gated\(\) does"):
        distnorm.revert(model)
    assert isinstance(model[1], DistNorm)


@final
@dataclass(frozen=True, kw_only=True)
class Whole(Method):
    """Layer norm over everything but the batch, of which torch has a module."""

    def normalize(self, x_NCL: Tensor, share: Share, layer: Layer, *inputs: Tensor) -> Tensor:
        return F.group_norm(x_NCL, 1, layer.parameters["weight"], layer.parameters["bias"], layer.eps)

    def evaluate(self, x_NCL: Tensor, layer: Layer, *inputs: Tensor) -> Tensor:
        return F.group_norm(x_NCL, 1, layer.parameters["weight"], layer.parameters["bias"], layer.eps)

    def stock(self, features: int, layer: Layer) -> nn.Module:
        module = nn.GroupNorm(1, features, layer.eps)
        module.weight, module.bias = layer.parameters["weight"], layer.parameters["bias"]
        return module


@pytest.mark.parametrize("alone", [True, False])
def test_revert_to_a_module_of_torch(alone):
    norm = nn.BatchNorm2d(4)
    model = distnorm.convert(
        norm if alone else nn.Sequential(nn.Conv2d(4, 4, 1), norm), Recipe(method=Whole(), policy=Local())
    )
    x = torch.randn(1, 4, 1, 1)  # 1 value per channel is enough, since nothing is shared
    expected = model(x)
    with distnorm.Ledger(model) as ledger:
        model(x).sum().backward()
    assert ledger.collectives == 0
    weight = norm.weight
    reverted = distnorm.revert(model)
    found = reverted if alone else reverted[1]
    assert type(found) is nn.GroupNorm and found.weight is weight and found.training
    torch.testing.assert_close(reverted(x), expected)


def test_scripting_says_what_to_do():
    model = distnorm.convert(nn.Sequential(nn.BatchNorm2d(4)), Recipe(method=Tilted(), policy=Local())).eval()
    with pytest.raises(RuntimeError, match=r"0: torch.jit.script cannot compile Tilted\(\).*fold"):
        torch.jit.script(model)
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(torch.jit.script(distnorm.fold(model))(x), model(x))
