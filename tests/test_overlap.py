"""``sync_bn(overlap=True)`` in one process: passes that are partial, orders of calls, inputs of other shapes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import distnorm
from distnorm import Recipe
from distnorm.layers.overlap import LateConv
from distnorm.methods import BatchNorm
from distnorm.policies import AllReduce, Facts


def converted(model: nn.Module) -> nn.Module:
    """By kernels, though there is one rank."""
    return distnorm.convert(copy.deepcopy(model), Recipe(method=BatchNorm(), policy=AllReduce(), overlap=True))


@pytest.fixture(autouse=True)
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were others to share with."""
    along = Facts.along
    monkeypatch.setattr(Facts, "along", lambda facts, routes, alone: along(facts, routes))


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Tanh()
    return nn.Sequential(*layers, nn.Conv2d(3, 2, 3)).double()


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 2, 9, 9, dtype=torch.double, generator=torch.Generator().manual_seed(n))


def same(given: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for one, two in zip(given, expected, strict=True):
        torch.testing.assert_close(one, two)


Wanted = Callable[[nn.Sequential, Tensor], list[Tensor]]
PARTS: dict[str, Wanted] = {
    "a norm's weight": lambda model, x: [model[1].weight],
    "the last norm's": lambda model, x: [model[4].weight, model[4].bias],
    "a convolution's weight": lambda model, x: [model[3].weight],
    "a norm's bias and the input": lambda model, x: [model[4].bias, x],
}


@pytest.mark.parametrize("second", ["gradient penalty", "plain", "partial"])
@pytest.mark.parametrize("wanted", PARTS.values(), ids=PARTS)
def test_what_a_partial_pass_leaves_is_not_for_the_next(wanted: Wanted, second: str) -> None:
    def run(model: nn.Sequential) -> list[Tensor | None]:
        x = images().requires_grad_()
        y = model(x)
        first = torch.autograd.grad((100 * y).square().sum(), wanted(model, x), retain_graph=True)
        loss = y.square().sum()
        if second == "gradient penalty":
            (dx,) = torch.autograd.grad(loss, x, create_graph=True)
            dx.square().sum().backward()
        elif second == "partial":
            return [*first, *torch.autograd.grad(loss, [x, *model.parameters()])]
        else:
            loss.backward()
        return [*first, x.grad, *(each.grad for each in model.parameters())]

    same(run(converted(chain())), run(chain()))


def test_a_pass_that_raised_leaves_nothing() -> None:
    def run(model: nn.Sequential) -> list[Tensor | None]:
        x = images().requires_grad_()
        y = model(x)
        handle = model[0].weight.register_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            (100 * y).square().sum().backward(retain_graph=True)
        handle.remove()
        model.zero_grad()
        x.grad = None
        y.sum().backward()
        return [x.grad, *(each.grad for each in model.parameters())]

    same(run(converted(chain())), run(chain()))


def _fail(gradient: Tensor) -> Tensor:
    raise ZeroDivisionError


class Shortcut(nn.Module):
    """Its shortcut is registered last and called first."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.conv2, self.bn2 = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.shortcut = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x: Tensor) -> Tensor:
        identity = self.shortcut(x)
        return torch.tanh(self.bn2(self.conv2(torch.tanh(self.bn1(self.conv1(x))))) + identity)


class Backwards(nn.Module):
    """Convolutions are called in the reverse order of registration, and one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.ModuleList(nn.BatchNorm2d(2) for _ in range(3))
        self.conv = nn.ModuleList(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
        self.layers = nn.ModuleList(m for pair in zip(self.bn, self.conv, strict=True) for m in pair)

    def forward(self, x: Tensor) -> Tensor:
        for norm, conv in zip(reversed(self.bn), reversed(self.conv), strict=True):
            x = torch.tanh(norm(conv(conv(x))))
        return x


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("block", [Shortcut, Backwards])
def test_the_order_of_calls_is_free(block: type[nn.Module], accumulated: int, momentum: float) -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(block(), block()).double()

    def run(model: nn.Module) -> list[Tensor | None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=momentum)
        for step in range(4):
            for part in range(accumulated):
                model(images(2 + step + part)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [each.detach() for each in model.parameters()]

    mine = converted(stock)
    assert any(isinstance(each, LateConv) for each in mine.modules())
    same(run(mine), run(stock))


def test_parameters_may_be_replaced_between_the_norm_and_its_convolution() -> None:
    def run(model: nn.Sequential) -> list[Tensor | None]:
        y = model[2](model[1](model[0](images())))
        model[3].weight = nn.Parameter(torch.ones_like(model[3].weight))
        model[3](y).square().sum().backward()
        return [each.grad for each in model[:4].parameters()]

    same(run(converted(chain())), run(chain()))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_an_input_without_a_batch(dimensions: int) -> None:
    """Of the convolution: norms need one."""
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    torch.manual_seed(0)
    stock = nn.Sequential(norm(2), conv(2, 3, 2)).double()

    def run(model: nn.Sequential) -> list[Tensor | None]:
        x = torch.randn(2, 2, *[4] * dimensions, dtype=torch.double, generator=torch.Generator().manual_seed(0))
        loss = sum(model[1](each).square().sum() for each in model[0](x))
        loss.backward()
        return [each.grad for each in model.parameters()]

    same(run(converted(stock)), run(stock))


def test_a_batch_of_gradients() -> None:
    def run(model: nn.Sequential) -> list[Tensor | None]:
        x = images().requires_grad_()
        y = model(x)
        many = torch.stack([torch.ones_like(y), y.detach()])
        return list(torch.autograd.grad(y, [model[6].weight, model[6].bias], many, is_grads_batched=True))

    same(run(converted(chain())), run(chain()))
