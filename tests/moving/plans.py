"""Plans of calls over steps and ranks, and what a threaded rank sees when it follows one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import distnorm
from distnorm import Recipe
from tests.moving.written_out import Answer, Call, Step, draw

C, STEPS = 3, 7


class Plan(NamedTuple):
    """Per step, every rank's calls; and the batches of a forward under no_grad after it, or None."""

    steps: list[Step]
    extras: list[list[Tensor] | None]


class Seen(NamedTuple):
    answers: list[list[Answer]]
    extras: list[Tensor | None]
    running: list[tuple[Tensor, Tensor]]


def make_plan(seed: int, ranks: int, *, together: bool) -> Plan:
    """Random sizes from 0 to 4; ``together`` means that ranks call the layer equally often."""
    generator = torch.Generator().manual_seed(seed)
    pick = lambda high: int(torch.randint(high, (), generator=generator))  # noqa: E731
    steps: list[Step] = []
    extras: list[list[Tensor] | None] = []
    for at in range(STEPS):
        common = pick(3)
        calls = [common if together else pick(3) for _ in range(ranks)]
        steps.append([[draw(generator, pick(5), C, at / 5) for _ in range(each)] for each in calls])
        wanted = pick(3) == 0
        extras.append([draw(generator, 2 + pick(3), C, -1.0).x for _ in range(ranks)] if wanted else None)
    return Plan(steps, extras)


def make_layer(recipe: Recipe, mesh: DeviceMesh | None = None) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(C).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(C, generator=generator, dtype=torch.float64) + 0.5)
    return distnorm.convert(layer, recipe, mesh=mesh)


def run_calls(layer: nn.Module, calls: list[Call]) -> list[Answer]:
    """All forwards, then one backward pass through all of them."""
    xs = [call.x.clone().requires_grad_() for call in calls]
    ys = [layer(x) for x in xs]
    dxs = torch.autograd.grad(ys, xs, [call.dy for call in calls]) if calls else ()
    return [Answer(y.detach(), dx) for y, dx in zip(ys, dxs, strict=True)]


def follow(rank: int, plan: Plan, recipe: Recipe, mesh: Callable[[], DeviceMesh] | None = None) -> Seen:
    """The plan on one rank, with steps ended by hand: a rank that skips the layer has no backward pass."""
    layer = make_layer(recipe, None if mesh is None else mesh())
    distnorm.attach(layer, manual=True)
    seen = Seen([], [], [])
    for calls, extra in zip(plan.steps, plan.extras, strict=True):
        seen.answers.append(run_calls(layer, calls[rank]))
        distnorm.end_step(layer)
        with torch.no_grad():
            seen.extras.append(None if extra is None else layer(extra[rank]))
        assert layer.running_mean is not None and layer.running_var is not None
        seen.running.append((layer.running_mean.clone(), layer.running_var.clone()))
    return seen
