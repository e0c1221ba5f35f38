"""RMS over a blocking window on one rank is MABN as published, written out here from its formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import distnorm
from distnorm import Recipe
from distnorm.methods import RMS
from distnorm.policies import AllReduce, Moving, Warmup

pytestmark = pytest.mark.usefixtures("entries")

C, WINDOW, WARMUP, EPS, OLD = 4, 16, 100, 1e-5, 0.98
STEPS = 1200


class Buffers:
    """What the published layer keeps: two rings, the running second moment, and a counter from 1."""

    def __init__(self, warmup: int = WARMUP) -> None:
        self.warmup = warmup
        self.x2 = torch.zeros(WINDOW, C, dtype=torch.float64)
        self.gz = torch.zeros(WINDOW, C, dtype=torch.float64)
        self.running_var = torch.ones(C, dtype=torch.float64)
        self.iteration = 0
        self.corrections: list[Tensor] = []

    @property
    def windowed(self) -> bool:
        return self.iteration > WINDOW and self.iteration >= self.warmup


def _wide(values_C: Tensor) -> Tensor:
    return values_C.view(1, C, 1, 1)


class Published(torch.autograd.Function):
    """One iteration: y = weight * r * z + bias with z = x / sqrt(mean of the ring + eps)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, buffers: Buffers) -> Tensor:
        buffers.iteration += 1
        row = buffers.iteration % WINDOW
        now_C = (x * x).mean((0, 2, 3))
        buffers.x2[row] = now_C
        moment_C = buffers.x2.mean(0) if buffers.windowed else now_C
        rms_C = (moment_C + EPS).sqrt()
        r_C = torch.ones_like(rms_C)
        if buffers.iteration > max(1000, buffers.warmup):
            buffers.corrections.append(rms_C / (buffers.running_var + EPS).sqrt())
            r_C = buffers.corrections[-1].clamp(1 / 5, 5)
        z = x / _wide(rms_C)
        ctx.save_for_backward(z, weight, rms_C, r_C)
        ctx.buffers = buffers
        buffers.running_var = OLD * buffers.running_var + (1 - OLD) * moment_C
        return _wide(weight) * _wide(r_C) * z + _wide(bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, rms_C, r_C = ctx.saved_tensors
        buffers = ctx.buffers
        g = _wide(weight) * _wide(r_C) * dy
        now_C = (g * z).mean((0, 2, 3))
        buffers.gz[buffers.iteration % WINDOW] = now_C
        psi_C = buffers.gz.mean(0) if buffers.windowed else now_C
        dx = (g - z * _wide(psi_C)) / _wide(rms_C)
        return dx, (dy * _wide(r_C) * z).sum((0, 2, 3)), dy.sum((0, 2, 3)), None


class Answer(NamedTuple):
    y: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    running_var: Tensor


def _scale(iteration: int) -> Tensor:
    """Channels that stand still, drift, and jump up and down by far more than the bound of 5."""
    jumps = {1050: 40.0, 1051: 40.0, 1120: 0.01}
    up = jumps.get(iteration, 1.0)
    down = 1.0 if iteration < 1080 else 1e-4
    return torch.tensor([1.0, 1 + iteration / 300, up, down], dtype=torch.float64).view(1, C, 1, 1)


def _inputs(generator: torch.Generator, iteration: int) -> tuple[Tensor, Tensor]:
    draw = lambda: torch.randn(2, C, 3, 3, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw() * _scale(iteration) + 0.3 * _scale(iteration), draw()


def _published(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, buffers: Buffers) -> Answer:
    x, weight, bias = (each.clone().requires_grad_() for each in (x, weight, bias))
    y = Published.apply(x, weight, bias, buffers)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), dy)
    return Answer(y.detach(), dx, dweight, dbias, buffers.running_var)


def _ours(x: Tensor, dy: Tensor, layer: nn.BatchNorm2d) -> Answer:
    x = x.clone().requires_grad_()
    y = layer(x)
    dx, dweight, dbias = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
    assert layer.running_var is not None
    return Answer(y.detach(), dx, dweight, dbias, layer.running_var.clone())


def _worst(given: Answer, expected: Answer) -> float:
    errors = [
        float((one - other).abs().max() / other.abs().max().clamp_min(1))
        for one, other in zip(given, expected, strict=True)
    ]
    return max(errors)


def test_a_blocking_window_on_one_rank_is_the_published_layer():
    """For 1,200 steps: warm-up, window, correction by the running statistics, and its bound in both directions."""
    policy = Warmup(first=AllReduce(), then=Moving(window=WINDOW, staleness=0), steps=WARMUP - 1)
    recipe = Recipe(method=RMS(clip=5.0, clip_after=1000), policy=policy, momentum=1 - OLD)
    layer = distnorm.convert(nn.BatchNorm2d(C).double(), recipe)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(C, generator=generator, dtype=torch.float64))
    weight, bias, buffers = layer.weight.detach(), layer.bias.detach(), Buffers()
    worst = []
    for iteration in range(1, STEPS + 1):
        x, dy = _inputs(generator, iteration)
        expected = _published(x, dy, weight, bias, buffers)
        worst.append(_worst(_ours(x, dy, layer), expected))
    assert max(worst) < 1e-11, f"step {worst.index(max(worst))}"
    seen = torch.stack(buffers.corrections)
    assert len(seen) == STEPS - 1000
    assert (seen > 5).any() and (seen < 1 / 5).any()  # the bound was met on both sides
    assert (seen != 1).all()


@pytest.mark.parametrize("warmup", [0, 1, 2, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 2, WINDOW + 3])
def test_windows_are_used_when_they_are_full(warmup: int) -> None:
    """The named recipe's schedule, on one rank and blocking as the published layer is."""
    named = distnorm.recipes.mabn(window=WINDOW, warmup=warmup)
    assert isinstance(named.policy, Warmup)
    policy = Warmup(then=Moving(window=WINDOW, staleness=0), steps=named.policy.steps)
    layer = distnorm.convert(nn.BatchNorm2d(C).double(), replace(named, policy=policy, weights="none"))
    generator = torch.Generator().manual_seed(warmup)
    weight, bias, buffers = layer.weight.detach(), layer.bias.detach(), Buffers(warmup)
    for iteration in range(1, 3 * WINDOW):
        x, dy = _inputs(generator, iteration)
        expected = _published(x, dy, weight, bias, buffers)
        assert _worst(_ours(x, dy, layer), expected) < 1e-11, iteration


@pytest.mark.parametrize("name", ["mabn", "hierarchical_mabn"])
@pytest.mark.parametrize(
    ("window", "warmup", "steps"), [(16, 100, 99), (16, 0, 16), (16, 17, 16), (16, 18, 17), (1, 0, 1)]
)
def test_exact_steps_of_the_named_recipes(name: str, window: int, warmup: int, steps: int) -> None:
    policy = distnorm.recipes.build(name, window=window, warmup=warmup).policy
    assert isinstance(policy, Warmup) and policy.steps == steps


def test_the_named_recipe_is_this_with_one_step_in_flight():
    recipe = distnorm.recipes.mabn()
    assert recipe.policy == Warmup(first=AllReduce(), then=Moving(window=16, staleness=1), steps=99)
    assert recipe.method == RMS(clip=5.0, clip_after=1000)
    assert recipe.momentum == 0.02
    assert recipe.weights == "centralized"


def test_options_of_the_named_recipe():
    recipe = distnorm.recipes.build("mabn", window=4, warmup=2000, clip=2.0, loss_reduction="sum")
    assert recipe.policy == Warmup(then=Moving(window=4, loss_reduction="sum"), steps=1999)
    assert recipe.method == RMS(clip=2.0, clip_after=2000)
