"""Methods with parameters, buffers, several shares, weights that carry gradient, maxima and further inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import distnorm
from distnorm import Recipe
from distnorm.methods import RMS, Method
from distnorm.policies import AllReduce, Local, Moving, Policy, StaleMix
from tests.laws.ranks import nodes_by_local
from tests.support.threads import run_threads
from tests.tilted import Gated, Peaked, Tilted, joined
from tests.zoo import EXACT, MOVING, POLICIES

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
    return distnorm.convert(
        layer, Recipe(method=method, policy=policy), mesh=nodes_by_local(world_size) if world_size > 1 else None
    )


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


ADMITTED = [
    *((method, name) for method in (Tilted(), Gated()) for name in (POLICIES | MOVING)),
    *((Peaked(), name) for name in POLICIES),
]


def train(model: nn.Module, rank: int, steps: int, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """Everything that a few steps leave: outputs, gradients, buffers."""
    found = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(10 * rank + step)
        x = torch.randn(2 + rank % 2, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
        y = (model if run is None else run)(x, *offset(model.recipe.method, x))
        y.square().sum().backward()
        assert x.grad is not None
        found += [y.detach(), x.grad, *(buffer.clone() for buffer in model.buffers())]
    return [*found, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


CLIPPED = [(RMS(clip=1.1, clip_after=1), "AllReduce"), (RMS(clip=1.1), "Moving")]
# Graphs and recomputations do not show which policy shares, so most pairs are slow tests.
MOST = [
    pytest.param(method, policy, marks=[pytest.mark.slow] * (policy not in ("AllReduce", "Moving")))
    for method, policy in ADMITTED
]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("method", "policy"), MOST, ids=str)
def test_recomputation_changes_nothing(method, policy, reentrant):
    """Values, running statistics and the number of collectives."""

    def run(rank: int, checkpointed: bool) -> tuple[list[Tensor], int]:
        layer = make(method, (POLICIES | MOVING)[policy], 4)
        again = lambda *given: checkpoint(layer, *given, use_reentrant=reentrant)  # noqa: E731
        with distnorm.Ledger(layer) as ledger:
            found = train(layer, rank, 4, again if checkpointed else None)
        return found, ledger.collectives

    plain, checked = run_threads(4, run, False), run_threads(4, run, True)
    assert [each[1] for each in plain] == [each[1] for each in checked]
    torch.testing.assert_close([each[0] for each in checked], [each[0] for each in plain], rtol=0, atol=0)


@pytest.mark.parametrize(("method", "policy"), [*MOST, *CLIPPED], ids=str)
def test_compiled(method, policy):
    """In one graph, whatever the policy, and with the buffers that the forward found."""
    torch.compiler.reset()
    layer, eager = (make(method, (POLICIES | MOVING)[policy]) for _ in range(2))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found, wanted = train(layer, 0, 4, compiled), train(eager, 0, 4)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    compiled.eval(), eager.eval()
    torch.testing.assert_close(compiled(x, *offset(method, x)), eager(x, *offset(method, x)))


@pytest.mark.parametrize("method", [Tilted(), Gated()], ids=str)
def test_a_window_of_one_shared_step_is_exact(method):
    def run(rank: int, policy: Policy) -> list[Tensor]:
        return train(make(method, policy, 2), rank, 3)

    one, exact = (run_threads(2, run, each) for each in (Moving(window=1, staleness=0), AllReduce()))
    torch.testing.assert_close(one, exact)


@pytest.mark.parametrize("policy", [Moving(window=4), StaleMix(window=4)], ids=str)
@pytest.mark.parametrize("method", [Tilted(), Gated()], ids=str)
def test_a_window_over_equal_steps_is_one_step(method, policy):
    """Without learning, and on ranks with equal batches, old values are as good as new ones; weights included."""

    def run(rank: int, policy: Policy) -> list[Tensor]:
        layer = make(method, policy, 2)
        for _ in range(3):
            x = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
            layer.zero_grad()
            if "level" in layer._buffers:
                layer.level.fill_(0.25)  # the transform of ``Tilted`` depends on it
            y = layer(x)
            y.square().mean().backward()
        assert x.grad is not None
        return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]

    torch.testing.assert_close(run_threads(2, run, policy), run_threads(2, run, AllReduce()))


@pytest.mark.parametrize("method", [Tilted(), Gated()], ids=str)
@pytest.mark.parametrize("policy", MOVING.values(), ids=MOVING.keys())
def test_evaluation_includes_what_is_in_flight(method, policy):
    """As it is once the next step has ended, also in a saved model; and all ranks agree."""

    def run(rank: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        layer = make(method, policy, 4)
        distnorm.attach(layer, manual=True)  # threads count their backward passes together
        for _ in range(4):
            train(layer, rank, 1)
            distnorm.end_step(layer)
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        other = make(method, Local())
        other.load_state_dict(layer.state_dict())
        now, saved = layer.eval()(x).detach(), other.eval()(x).detach()
        distnorm.end_step(layer)
        return now, saved, layer(x).detach(), list(layer.buffers())

    results = run_threads(4, run)
    for now, saved, later, buffers in results:
        torch.testing.assert_close(now, saved, rtol=0, atol=0)
        torch.testing.assert_close(now, later)
        torch.testing.assert_close(buffers, results[0][3], rtol=0, atol=0)


def test_maxima_are_refused_where_steps_are_averaged():
    with pytest.raises(ValueError, match=r"Peaked\(\).*Moving.*maxima.*AllReduce"):
        Recipe(method=Peaked(), policy=Moving())
