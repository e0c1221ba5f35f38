"""Saved tensors may come back as others than were saved: of other strides, offset, memory, or a subclass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

import distnorm
from distnorm import Recipe
from distnorm.methods import RMS, BatchNorm
from distnorm.policies import AllReduce, Local, Moving
from tests.support.threads import run_threads

Change = Callable[[Tensor], Tensor]


class Wrapped(Tensor):
    """Has no memory of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def unwrap(each: object) -> object:
            return each.inner if isinstance(each, Wrapped) else each

        return func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {}))


def _offset(x: Tensor) -> Tensor:
    memory = torch.full((x.numel() + 3,), torch.nan, dtype=x.dtype)
    return memory[3:].view(x.shape).copy_(x)


def _gaps(x: Tensor) -> Tensor:
    return torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0]


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _reversed(x: Tensor) -> Tensor:
    """Without a sign: it is kept apart from the values."""
    return torch._neg_view(-x)


CHANGES: dict[str, Change] = {
    "contiguous": lambda x: x.contiguous(memory_format=torch.contiguous_format).clone(),
    "channels last": lambda x: x.clone(memory_format=torch.channels_last) if x.dim() == 4 else x.clone(),
    "offset": _offset,
    "gaps": _gaps,
    "transposed": _transposed,
    "negative": _reversed,
    "wrapped": Wrapped,
}
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def _gradients(layer: nn.Module, x: Tensor, *, residual: Tensor | None = None, relu: bool = False) -> list[Tensor]:
    """Of a stock layer in float64, or of a converted one with its epilogue."""
    if isinstance(layer, distnorm.DistNorm):
        y = layer(x, residual=residual, relu=relu) if relu or residual is not None else layer(x)
    else:
        y = layer(x) if residual is None else layer(x) + residual
        y = y.relu() if relu else y
    loss = (y.square() * torch.linspace(0, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum()
    wanted = [x, layer.weight, layer.bias, *([] if residual is None else [residual])]
    return list(torch.autograd.grad(loss, wanted))


def _layers(recipe: Recipe | str) -> tuple[nn.Module, nn.Module]:
    stock = nn.BatchNorm2d(3)
    with torch.no_grad():
        stock.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
        stock.bias.copy_(torch.tensor([0.1, 0.0, 0.3]))
    mine = nn.BatchNorm2d(3)
    mine.load_state_dict(stock.state_dict())
    return stock.double(), distnorm.convert(nn.Sequential(mine), recipe)[0]


def _input(memory_format: torch.memory_format) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 6) * 2 + torch.tensor([0.0, 1.0, 10.0]).view(3, 1, 1)
    return x.to(memory_format=memory_format).requires_grad_()


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=["contiguous input", "channels-last input"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("epilogue", ["", "relu", "residual", "residual, relu"])
@pytest.mark.parametrize("shares", [False, True], ids=["alone", "shares"])
def test_gradients_are_those_of_the_values(
    shares: bool, epilogue: str, change: Change, memory_format: torch.memory_format
) -> None:
    recipe = Recipe(method=BatchNorm(), policy=AllReduce() if shares else Local())
    stock, mine = _layers(recipe)
    x = _input(memory_format)
    residual = torch.linspace(-3, 3, x.numel()).view_as(x).requires_grad_() if "residual" in epilogue else None
    options = {"residual": residual, "relu": "relu" in epilogue}
    wide = {**options, "residual": None if residual is None else residual.detach().double().requires_grad_()}
    expected = _gradients(stock, x.detach().double().requires_grad_(), **wide)

    def run(_: int) -> list[Tensor]:
        with saved_tensors_hooks(lambda saved: saved, change):
            return _gradients(mine, x, **options)

    given = run(0) if not shares else _shared_with_nothing(mine, run)
    for one, two in zip(given, expected, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-4)


def _shared_with_nothing(mine: nn.Module, run: Callable[[int], list[Tensor]]) -> list[Tensor]:
    """By the path that shares, with a second rank whose batch is empty."""

    def rank(at: int) -> list[Tensor]:
        if at == 0:
            return run(at)
        layer = distnorm.convert(nn.Sequential(nn.BatchNorm2d(3)), mine.recipe)[0]
        x = torch.empty(0, 3, 5, 6, requires_grad=True)
        layer(x).sum().backward()
        return []

    return run_threads(2, rank)[0]


@pytest.mark.parametrize("way", ["save_on_cpu", "checkpoint and save_on_cpu", "fuse", "overlap"])
def test_offloading_to_the_host(way: str) -> None:
    torch.manual_seed(1)
    stock = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).double()
    mine = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    mine.load_state_dict(stock.state_dict())
    distnorm.convert(mine, "sync_bn", fuse=way == "fuse", overlap=way == "overlap")
    x = torch.randn(4, 3, 9, 9).to(memory_format=torch.channels_last)

    run = (lambda x: checkpoint(mine, x, use_reentrant=False)) if "checkpoint" in way else mine
    with save_on_cpu(pin_memory=True):  # whose copies are contiguous
        loss = run(x).square().mean()
    loss.backward()
    stock(x.double()).square().mean().backward()
    for one, two in zip(mine.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one.grad.double(), two.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [RMS(), BatchNorm()], ids=str)
@pytest.mark.parametrize("policy", [AllReduce(), Moving(window=2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_method_and_policy(method: distnorm.methods.Method, policy: object, dtype: torch.dtype) -> None:
    """A hook that stores values otherwise may give them back in another dtype, too."""
    recipe = Recipe(method=method, policy=policy)
    x = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last).requires_grad_()

    def run(change: Change) -> list[Tensor]:
        layer = distnorm.convert(nn.Sequential(nn.BatchNorm2d(3)), recipe)[0]
        with saved_tensors_hooks(lambda saved: saved, change):
            loss = layer(x).pow(3).sum()
        return list(torch.autograd.grad(loss, [x, layer.weight, layer.bias]))

    changed = run(lambda saved: saved.to(dtype).contiguous().clone())
    for one, two in zip(changed, run(lambda saved: saved), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
