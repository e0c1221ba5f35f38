"""Fused modules whose children run in another order than they stand, or whose arguments have names of ours."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import distnorm


class Reversed(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(self._modules.values())  # type: ignore[arg-type]


class Twice(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return iter([*self._modules.values()] * 2)  # type: ignore[list-item]


class Skipping(nn.Sequential):
    def __iter__(self) -> Iterator[nn.Module]:
        return (each for each in self._modules.values() if not isinstance(each, nn.ReLU))  # type: ignore[misc]


class Ending(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def parts() -> list[nn.Module]:
    return [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)]


def agree(model: nn.Module, **arguments: Any) -> None:
    fused = distnorm.convert(copy.deepcopy(model), "local_bn", fuse=True)
    for _ in range(2):
        x = torch.randn(4, 3, 2, 5)
        torch.testing.assert_close(fused(x, **arguments), model(x, **arguments), rtol=1e-5, atol=1e-5)
    for one, other in zip(fused.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:distnorm.convert.fuse=True. fused nothing")
@pytest.mark.parametrize("kind", [Reversed, Twice, Skipping, nn.Sequential])
@pytest.mark.parametrize("ends", [False, True])
def test_children_run_in_the_order_of_their_sequence(kind: type[nn.Sequential], ends: bool) -> None:
    sequence = kind(*parts())
    agree(Ending(sequence) if ends else sequence)


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor, *, module: float = 1.0, plan: float = 1.0) -> Tensor:
        return functional.relu(self.bn(x)) * module * plan


class Options(Module):
    def forward(self, x: Tensor, **options: float) -> Tensor:  # type: ignore[override]
        return functional.relu(self.bn(x)) * options["module"] * options["plan"]


class Ours(Module):
    def forward(self, x: Tensor, _applies: float = 1.0, _fused: float = 1.0, _plain: float = 1.0) -> Tensor:  # type: ignore[override]
        return functional.relu(self.bn(x)) * _applies * _fused * _plain


@pytest.mark.parametrize("kind", [Module, Options])
def test_arguments_may_have_any_name(kind: type[nn.Module]) -> None:
    agree(kind(), module=2.0, plan=3.0)
    agree(Ours(), _applies=2.0, _fused=3.0, _plain=4.0)
