"""What the laws do on each threaded rank: build a layer, run it, hand back what the law compares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import distnorm
from distnorm import Recipe
from distnorm.policies import Policy, Reducer
from distnorm.transport import Topology
from distnorm.types import Layout


class Case(NamedTuple):
    """One joined batch and the affine parameters it meets."""

    inputs: list[Tensor]
    cotangents: list[Tensor]
    weight: Tensor
    bias: Tensor


class Answer(NamedTuple):
    """What one rank, or the reference, found."""

    y: Tensor
    dx: Tensor
    ddx: Tensor
    dweight: Tensor
    dbias: Tensor
    ddweight: Tensor
    running_mean: Tensor
    running_var: Tensor


def random_case(
    sizes: Sequence[int], spatial: Sequence[int], *, mean: float, seed: int, dtype: torch.dtype = torch.float64
) -> Case:
    """A case with ``sizes[k]`` samples of 3 channels on rank k; every channel has its own mean and spread."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    spread = (1, 3, *(1,) * len(spatial))
    scale, shift = draw(*spread).exp(), draw(*spread) + mean
    inputs = [(draw(size, 3, *spatial) * scale + shift).to(dtype) for size in sizes]
    cotangents = [draw(size, 3, *spatial).to(dtype) for size in sizes]
    return Case(inputs, cotangents, draw(3).to(dtype), draw(3).to(dtype))


def nodes_by_local(world_size: int) -> DeviceMesh:
    """A mesh of nodes x local ranks: 2 x 2 for 4 ranks, else one local rank per node."""
    local = 2 if world_size == 4 else 1
    ranks = torch.arange(world_size).view(-1, local)
    return DeviceMesh("cpu", ranks, mesh_dim_names=("node", "local"), _init_backend=False)


def make_layer(recipe: Recipe, case: Case, world_size: int) -> nn.SyncBatchNorm:
    """A converted layer with the case's parameters."""
    layer = nn.SyncBatchNorm(3).to(case.weight.dtype)  # the stock layer that takes every number of dimensions
    layer.weight.data.copy_(case.weight)
    layer.bias.data.copy_(case.bias)
    return distnorm.convert(layer, recipe, mesh=nodes_by_local(world_size))


def answer_on_rank(rank: int, case: Case, recipe: Recipe) -> Answer:
    """One training step with first and second derivatives, on one of ``len(case.inputs)`` ranks."""
    layer = make_layer(recipe, case, len(case.inputs))
    x = case.inputs[rank].clone().requires_grad_()
    y = layer(x)
    first = torch.autograd.grad(y, [x, layer.weight, layer.bias], case.cotangents[rank], create_graph=True)
    ddx, ddweight = torch.autograd.grad(first[0].square().sum(), [x, layer.weight])
    found = [y, *first, ddx, ddweight, layer.running_mean, layer.running_var]
    y, dx, dweight, dbias, ddx, ddweight, mean, var = (each.detach() for each in found)
    return Answer(y, dx, ddx, dweight, dbias, ddweight, mean, var)


def bind(policy: Policy, world_size: int, layout: Layout) -> Reducer:
    """The policy's reducer on this threaded rank, for layers of ``layout``."""
    return policy.bind(Topology(tuple(range(world_size)), mesh=nodes_by_local(world_size)), layout)
