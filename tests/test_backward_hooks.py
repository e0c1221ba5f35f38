"""Forwards inside of a backward pass: new ones in hooks, repetitions in checkpoints; and gradients that are zero."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import distnorm
from distnorm import Ledger
from tests.support.threads import run_threads

RECIPES = ["sync_bn", "local_bn"]


def images(mean: float = 0.0, seed: int = 0) -> Tensor:
    return mean + torch.randn(4, 3, 5, 5, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def norms(recipe: str) -> tuple[nn.Module, nn.Module]:
    stock = nn.BatchNorm2d(3, dtype=torch.double)
    return stock, distnorm.convert(nn.Sequential(copy.deepcopy(stock)), recipe)[0]


# --- new forwards --------------------------------------------------------------------------------

Register = Callable[[nn.Module, Tensor, Callable[..., None]], object]

HOOKS: dict[str, Register] = {
    "of a tensor": lambda layer, y, hook: y.register_hook(hook),
    "of a node": lambda layer, y, hook: y.grad_fn.register_hook(hook),
    "of a parameter": lambda layer, y, hook: layer.weight.register_post_accumulate_grad_hook(hook),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("again", ["another input", "the same input"])
def test_a_forward_in_a_hook_is_a_new_one(again: str, recipe: str, register: Register) -> None:
    other = images() if again == "the same input" else images(12.0, 1)

    def run(layer: nn.Module) -> list[Tensor]:
        x, seen = images().requires_grad_(), []
        y = layer(x)
        register(layer, y, lambda *_: seen.append(layer(other).detach()))
        y.square().sum().backward()
        assert len(seen) == 1
        return [x.grad, layer.weight.grad, *seen, *layer.buffers()]

    stock, mine = norms(recipe)
    for given, expected in zip(run(mine), run(stock), strict=True):
        torch.testing.assert_close(given, expected)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_forward_in_a_hook_of_a_module(recipe: str) -> None:
    def run(layer: nn.Module) -> list[Tensor]:
        tail, seen = nn.Tanh(), []
        tail.register_full_backward_hook(lambda *_: seen.append(layer(images(12.0, 1)).detach()))
        tail(layer(images().requires_grad_())).square().sum().backward()
        return [*seen, *layer.buffers()]

    stock, mine = norms(recipe)
    for given, expected in zip(run(mine), run(stock), strict=True):
        torch.testing.assert_close(given, expected)


def test_ranks_share_in_a_hook() -> None:
    """The new forward normalizes by its own joined batch, in a collective of its own."""

    def run(rank: int) -> tuple[Tensor, int]:
        _, layer = norms("sync_bn")
        seen: list[Tensor] = []
        with Ledger(nn.Sequential(layer)) as ledger:
            y = layer(images(seed=rank).requires_grad_())
            y.register_hook(lambda dy: seen.append(layer(images(5.0 * rank, 10 + rank)).detach()))
            y.square().sum().backward()
        return seen[0], ledger.collectives

    joined = torch.cat([images(5.0 * rank, 10 + rank) for rank in range(2)])
    expected = nn.BatchNorm2d(3, dtype=torch.double)(joined).chunk(2)
    for (given, collectives), each in zip(run_threads(2, run), expected, strict=True):
        torch.testing.assert_close(given, each)
        assert collectives == 3


class Elsewhere(torch.autograd.Function):
    """Its backward runs a layer on other values: proof against "inside of a Function's backward"."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, layer: nn.Module, seen: list[Tensor]) -> Tensor:
        ctx.layer, ctx.seen = layer, seen
        return y.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen.append(ctx.layer(images(12.0, 1)).detach())
        return dy, None, None


def test_a_forward_of_other_values_in_a_backward() -> None:
    def run(rank: int) -> list[Tensor]:
        _, layer = norms("sync_bn")
        seen: list[Tensor] = []
        Elsewhere.apply(layer(images().requires_grad_()), layer, seen).square().sum().backward()
        return [*seen, *layer.buffers()]

    stock, _ = norms("sync_bn")
    stock(images())
    expected = stock(images(12.0, 1))
    for given in run_threads(2, run):
        torch.testing.assert_close(given[0], expected)
        # Unbiased over twice as many values.
        torch.testing.assert_close(given[1], stock.running_mean)


# --- repetitions ---------------------------------------------------------------------------------


class Own(torch.autograd.Function):
    """A reentrant checkpoint as many packages write it."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        y.backward(dy)
        return None, x.grad


def _unpacked(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Recomputes where a saved tensor is unpacked, for itself alone."""
    packed: list[Tensor] = []

    def unpack_again(index: int) -> Tensor:
        again: list[Tensor] = []
        with (
            torch.enable_grad(),
            saved_tensors_hooks(lambda t: again.append(t) or len(again) - 1, lambda at: again[at]),
        ):
            run(x.detach().requires_grad_())
        return again[index]

    with saved_tensors_hooks(lambda t: packed.append(t.detach()) or len(packed) - 1, unpack_again):
        return run(x)


CHECKPOINTS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]] = {
    "torch's": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "an own Function": Own.apply,
    "unpacking": _unpacked,
}


@pytest.mark.parametrize("way", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpoints_repeat(recipe: str, way: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> None:
    """No second collective, running statistics once, gradients of the joined batch."""

    def run(rank: int, repeats: bool) -> tuple[list[Tensor], int]:
        _, layer = norms(recipe)
        model = nn.Sequential(layer, nn.Tanh())
        x = images(seed=rank).requires_grad_()
        with Ledger(model) as ledger:
            y = way(model, x) if repeats else model(x)
            y.square().sum().backward()
        return [x.grad, layer.weight.grad, *layer.buffers()], ledger.collectives

    for given, expected in zip(run_threads(2, run, True), run_threads(2, run, False), strict=True):
        assert given[1] == expected[1]
        torch.testing.assert_close(given[0], expected[0])


# --- gradients that are zero ---------------------------------------------------------------------


class Plain(nn.Module):
    """Ends with a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)))


class Residual(Plain):
    """Ends with an addition and a ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)) + x)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("net", [Plain, Residual])
@pytest.mark.parametrize("recipe", [*RECIPES, "hierarchical_bn"])
def test_a_penalty_as_the_only_loss_gives_every_parameter_a_gradient(
    recipe: str, net: type[nn.Module], power: int
) -> None:
    """Zeros for the last bias, as stock layers before a ReLU have: DDP waits for every parameter."""

    def run(model: nn.Module) -> list[Tensor | None]:
        x = images().requires_grad_()
        (dx,) = torch.autograd.grad(model(x).pow(power).sum(), x, create_graph=True)
        dx.square().sum().backward()
        return [each.grad for each in model.parameters()]

    stock = net().double()
    mine = distnorm.convert(copy.deepcopy(stock), recipe, fuse=True)
    for name, given, expected in zip(dict(stock.named_parameters()), run(mine), run(stock), strict=True):
        assert (given is None) is (expected is None), name
        torch.testing.assert_close(given, expected)
