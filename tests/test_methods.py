"""Methods with parameters, buffers, several shares, weights that carry gradient, maxima and further inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import distnorm
from distnorm import Recipe
from distnorm.methods import Method
from distnorm.policies import AllReduce, Local, Policy
from tests.laws.ranks import nodes_by_local
from tests.support.threads import run_threads
from tests.tilted import Gated, Peaked, Tilted, joined
from tests.zoo import EXACT

OFFSET = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64).view(1, 3)


class Answer(NamedTuple):
    """What one rank found."""

    y: Tensor
    dx: Tensor
    ddx: Tensor
    parameters: list[Tensor]
    second: list[Tensor]
    level: Tensor
    mean: Tensor


def make(method: Method, policy: Policy, world_size: int = 1) -> nn.SyncBatchNorm:
    layer = nn.SyncBatchNorm(3).double()
    layer.weight.data.copy_(torch.tensor([0.5, 1.0, 2.0]))
    layer.bias.data.copy_(torch.tensor([0.1, 0.2, -0.3]))
    return distnorm.convert(layer, Recipe(method=method, policy=policy), mesh=nodes_by_local(world_size) if world_size > 1 else None)


def draw(sizes: Sequence[int], spatial: tuple[int, ...], seed: int, ties: bool) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    pairs = [torch.randn(2, size, 3, *spatial, generator=generator, dtype=torch.float64) for size in sizes]
    inputs = [each[0].round() if ties else each[0] for each in pairs]
    return inputs, [each[1] for each in pairs]


def offset(method: Method, x: Tensor) -> tuple[Tensor, ...]:
    return (OFFSET.view(1, 3, *(1,) * (x.dim() - 2)),) if method.inputs else ()


def on_rank(rank: int, inputs: list[Tensor], cotangents: list[Tensor], method: Method, policy: Policy) -> Answer:
    layer = make(method, policy, len(inputs))
    x = inputs[rank].clone().requires_grad_()
    parameters = [layer.weight, layer.bias, layer.slope]
    y = layer(x, *offset(method, x))
    first = torch.autograd.grad(y, [x, *parameters], cotangents[rank], create_graph=True)
    ddx, *second = torch.autograd.grad(first[0].square().sum(), [x, layer.weight, layer.slope])
    dx, *of_parameters = (each.detach() for each in first)
    return Answer(y.detach(), dx, ddx, of_parameters, second, layer.level, layer.running_mean)


def reference(inputs: list[Tensor], cotangents: list[Tensor], method: Method) -> list[Answer]:
    layer = make(method, Local())
    leaves = [each.clone().requires_grad_() for each in inputs]
    weight, bias, slope = (each.detach().clone().requires_grad_() for each in (layer.weight, layer.bias, layer.slope))
    given = OFFSET if method.inputs else None
    found = joined(leaves, weight, bias, slope, layer.level.double(), given)
    loss = sum(((y * dy).sum() for y, dy in zip(found.outputs, cotangents, strict=True)), torch.zeros(()))
    first = torch.autograd.grad(loss, [*leaves, weight, bias, slope], create_graph=True)
    dxs, parameters = first[: len(leaves)], [each.detach() for each in first[len(leaves) :]]
    penalty = sum((dx.square().sum() for dx in dxs), torch.zeros(()))
    second = torch.autograd.grad(penalty, [*leaves, weight, slope])
    level = layer.level.double().lerp(found.level.detach(), 0.1)
    mean = 0.1 * found.mean.detach()
    rows = zip(found.outputs, dxs, second[: len(leaves)], strict=True)
    return [
        Answer(y.detach(), dx.detach(), ddx, parameters, list(second[len(leaves) :]), level, mean)
        for y, dx, ddx in rows
    ]


@pytest.mark.parametrize("policy", EXACT.values(), ids=EXACT.keys())
@pytest.mark.parametrize("method", [Tilted(), Peaked()], ids=str)
@given(
    sizes=st.lists(st.integers(0, 3), min_size=2, max_size=4).filter(lambda sizes: sum(sizes) >= 2),
    spatial=st.sampled_from([(), (2, 3)]),
    ties=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_split_equals_joined(policy, method, sizes, spatial, ties, seed):
    """Outputs, first and second derivatives, and targets, over ranks without values and with tied maxima too."""
    inputs, cotangents = draw(sizes, spatial, seed, ties)
    found = run_threads(len(sizes), on_rank, inputs, cotangents, method, policy)
    wanted = reference(inputs, cotangents, method)
    for ours, right in zip(found, wanted, strict=True):
        for name in ("y", "dx", "ddx"):
            torch.testing.assert_close(
                getattr(ours, name),
                getattr(right, name),
                rtol=1e-9,
                atol=1e-9,
                msg=lambda text, name=name: f"{name}: {text}",
            )
        torch.testing.assert_close(ours.level.double(), right.level, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.mean.double(), right.mean, rtol=1e-6, atol=1e-6)
    for name in ("parameters", "second"):
        summed = [torch.stack(each).sum(0) for each in zip(*(getattr(ours, name) for ours in found), strict=True)]
        torch.testing.assert_close(summed, getattr(wanted[0], name), rtol=1e-9, atol=1e-9)
