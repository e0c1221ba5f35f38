"""One synchronized layer on real processes, against the joined batch in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from distnorm import Ledger
from distnorm.nn import SyncBatchNorm
from tests.support import reference
from tests.support.pool import Pool

C = 5
STATISTICS = {"running_mean": torch.linspace(-1, 1, C), "running_var": torch.linspace(0.5, 2, C)}


class Step(NamedTuple):
    """What one forward and backward of a layer gives on one rank."""

    y: Tensor
    dx: Tensor
    dweight: Tensor | None
    dbias: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    collectives: int


def layer(options: dict[str, Any] | None = None) -> SyncBatchNorm:
    """A layer whose parameters and running statistics are not the initial ones."""
    made = SyncBatchNorm(C, **(options or {}))
    with torch.no_grad():
        if made.weight is not None:
            made.weight.copy_(torch.linspace(0.5, 1.5, C))
        if made.bias is not None:
            made.bias.copy_(torch.linspace(1, -1, C))
        for name, values in STATISTICS.items():
            getattr(made, name).copy_(values)
    return made


def step_of(made: SyncBatchNorm, x: Tensor, dy: Tensor) -> Step:
    """Forward and backward; dx as autograd made it, not as a leaf accumulates it."""
    x = x.requires_grad_()
    parameters = list(made.parameters())
    with Ledger(made) as ledger:
        y = made(x)
        dx, *gradients = torch.autograd.grad(y, [x, *parameters], dy)
    dweight, dbias = [*gradients, None, None][:2]
    buffers = (made.running_mean, made.running_var, made.num_batches_tracked)
    return Step(y.detach(), dx, dweight, dbias, *buffers, ledger.collectives)


def one_step(rank: int, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], options: dict[str, Any]) -> Step:
    return step_of(layer(options), inputs[rank], cotangents[rank])


def make(sizes: Sequence[int], *rest: int, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and cotangents, one per rank; every rank has another distribution."""
    generator = torch.Generator().manual_seed(sum(sizes))
    shapes = [(size, C, *rest) for size in sizes]
    inputs = [torch.randn(shape, generator=generator) * (rank + 1) + rank for rank, shape in enumerate(shapes)]
    cotangents = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(dtype) for x in inputs], [dy.to(dtype) for dy in cotangents]


def expect(
    steps: Sequence[Step],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    tolerance: float,
    affine: tuple[bool, bool] = (True, True),
) -> None:
    """Every value of ``steps`` is that of the joined batch; ``affine`` says whether there are weight and bias."""
    wide = [x.detach().double().requires_grad_() for x in inputs]
    weight = torch.linspace(0.5, 1.5, C, dtype=torch.float64).requires_grad_() if affine[0] else None
    bias = torch.linspace(1, -1, C, dtype=torch.float64).requires_grad_() if affine[1] else None
    joined = reference.batch_norm(wide, weight, bias, **STATISTICS)
    wanted = [*wide, *(each for each in (weight, bias) if each is not None)]
    gradients = torch.autograd.grad(joined.outputs, wanted, [dy.double() for dy in cotangents])
    close = {"rtol": tolerance, "atol": tolerance, "check_dtype": False}
    for rank, step in enumerate(steps):
        torch.testing.assert_close(step.y, joined.outputs[rank].detach(), **close)
        torch.testing.assert_close(step.dx, gradients[rank], **close)
        torch.testing.assert_close(step.running_mean, joined.running_mean, rtol=1e-5, atol=1e-6, check_dtype=False)
        torch.testing.assert_close(step.running_var, joined.running_var, rtol=1e-5, atol=1e-6, check_dtype=False)
        assert step.num_batches_tracked == 1
        assert step.collectives == 2
    given = [[step.dweight for step in steps], [step.dbias for step in steps]][: sum(affine)]
    for parts, gradient in zip(given, gradients[len(wide) :], strict=True):
        total = torch.stack([part.double() for part in parts]).sum(0)
        torch.testing.assert_close(total, gradient, rtol=tolerance, atol=4 * tolerance)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-5)])
@pytest.mark.parametrize("rest", [(), (7,), (4, 3), (2, 3, 2)], ids=["2-D", "3-D", "4-D", "5-D"])
def test_every_layout(pool: Pool, world_size: int, dtype: torch.dtype, tolerance: float, rest: tuple[int, ...]) -> None:
    data = make([3] * world_size, *rest, dtype=dtype)
    steps = pool.run(world_size, one_step, *data, {"dtype": dtype})
    assert all(step.y.dtype == step.dx.dtype == dtype for step in steps)
    expect(steps, *data, tolerance=tolerance)


@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}], ids=["no affine", "no bias"])
def test_without_affine_parameters(pool: Pool, options: dict[str, bool]) -> None:
    data = make([3, 3], 4)
    steps = pool.run(2, one_step, *data, {"dtype": torch.float64, **options})
    expect(steps, *data, tolerance=1e-6, affine=(options.get("affine", True), False))


@pytest.mark.parametrize("rest", [(6,), (1,), ()], ids=["several values", "one value", "one value, 2-D"])
def test_one_input_per_process(pool: Pool, rest: tuple[int, ...]) -> None:
    data = make([1, 1], *rest)
    expect(pool.run(2, one_step, *data, {"dtype": torch.float64}), *data, tolerance=1e-6)


@pytest.mark.parametrize(
    "sizes", [(1, 6), (4, 0), (0, 4), (2, 0, 5, 1)], ids=["1+6", "second empty", "first empty", "2+0+5+1"]
)
def test_different_sizes(pool: Pool, sizes: tuple[int, ...]) -> None:
    data = make(sizes, 3, 2)
    steps = pool.run(len(sizes), one_step, *data, {"dtype": torch.float64})
    assert [len(step.y) for step in steps] == list(sizes)
    expect(steps, *data, tolerance=1e-6)


@pytest.mark.parametrize("rest", [(), (3, 2)], ids=["2-D", "4-D"])
def test_no_values_on_any_rank(pool: Pool, rest: tuple[int, ...]) -> None:
    inputs, cotangents = make([0, 0], *rest)
    for step in pool.run(2, one_step, inputs, cotangents, {"dtype": torch.float64}, timeout=20.0):
        assert step.y.shape == step.dx.shape == (0, C, *rest)
        assert step.num_batches_tracked == 0
        for name, values in STATISTICS.items():
            torch.testing.assert_close(getattr(step, name), values.double(), rtol=0, atol=0)
        for gradient in (step.dweight, step.dbias):
            torch.testing.assert_close(gradient, torch.zeros(C, dtype=torch.float64))


@pytest.mark.parametrize("wide_parameters", [False, True], ids=["half parameters", "float32 parameters"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_half_precision(pool: Pool, dtype: torch.dtype, tolerance: float, wide_parameters: bool) -> None:
    data = make([3, 5], 4, 2, dtype=dtype)
    steps = pool.run(2, one_step_in_half, *data, torch.float32 if wide_parameters else dtype)
    for step in steps:
        assert step.y.dtype == step.dx.dtype == dtype
        assert step.dweight.dtype == (torch.float32 if wide_parameters else dtype)
        assert step.running_mean.dtype == step.running_var.dtype == torch.float32
    expect(steps, *data, tolerance=tolerance)


def one_step_in_half(
    rank: int, inputs: Sequence[Tensor], cotangents: Sequence[Tensor], parameter_dtype: torch.dtype
) -> Step:
    return step_of(layer().to(parameter_dtype), inputs[rank], cotangents[rank])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dy_alike", [True, False], ids=["dy alike", "dy contiguous"])
@pytest.mark.parametrize(
    ("rest", "memory_format"), [((3, 4), torch.channels_last), ((2, 3, 4), torch.channels_last_3d)]
)
def test_channels_last(
    pool: Pool, rest: tuple[int, ...], memory_format: torch.memory_format, dy_alike: bool, dtype: torch.dtype
) -> None:
    inputs, cotangents = make([2, 3], *rest, dtype=dtype)
    inputs = [x.contiguous(memory_format=memory_format) for x in inputs]
    if dy_alike:
        cotangents = [dy.contiguous(memory_format=memory_format) for dy in cotangents]
    steps = pool.run(2, one_step, inputs, cotangents, {"dtype": torch.float64})
    for step in steps:
        assert step.y.is_contiguous(memory_format=memory_format)
        assert step.dx.is_contiguous(memory_format=memory_format)
    expect(steps, inputs, cotangents, tolerance=1e-6 if dtype is torch.float64 else 3e-2)


def test_process_groups_normalize_separately(pool: Pool) -> None:
    inputs, cotangents = make([3, 2, 1, 4], 2)
    steps = pool.run(4, one_step_in_pairs, inputs, cotangents)
    expect(steps[:2], inputs[:2], cotangents[:2], tolerance=1e-6)
    expect(steps[2:], inputs[2:], cotangents[2:], tolerance=1e-6)


def one_step_in_pairs(rank: int, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Step:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return one_step(rank, inputs, cotangents, {"dtype": torch.float64, "process_group": pairs[rank // 2]})


def test_a_layer_that_only_some_ranks_have(pool: Pool) -> None:
    inputs, cotangents = make([3, 2, 1, 4], 2)
    pairs, everyone = zip(*pool.run(4, two_steps, inputs, cotangents, timeout=20.0, group_timeout=5.0), strict=True)
    expect(pairs[:2], inputs[:2], cotangents[:2], tolerance=1e-6)
    assert pairs[2:] == (None, None)
    expect(everyone, inputs, cotangents, tolerance=1e-6)


def two_steps(rank: int, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> tuple[Step | None, Step]:
    """One layer on the first two ranks, then one on all."""
    pair = dist.new_group([0, 1])
    options = {"dtype": torch.float64}
    first = one_step(rank, inputs, cotangents, {**options, "process_group": pair}) if rank < 2 else None
    return first, one_step(rank, inputs, cotangents, options)


def test_ranks_in_different_numbers_of_groups(pool: Pool) -> None:
    data = make([3, 2, 1, 4], 2)
    steps = pool.run(4, one_step_beside_a_group, *data, timeout=20.0, group_timeout=5.0)
    expect(steps, *data, tolerance=1e-6)


def one_step_beside_a_group(rank: int, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> Step:
    """The first two ranks are in a group that has nothing to do with normalization."""
    group = dist.new_group([0, 1])
    step = one_step(rank, inputs, cotangents, {"dtype": torch.float64})
    if rank < 2:
        dist.barrier(group)
    return step


def test_a_group_without_this_rank_is_refused(pool: Pool) -> None:
    *members, first, second = pool.run_all(4, construct_in_first_pair)
    assert members == ["constructed"] * 2
    for error in (first, second):
        assert isinstance(error, ValueError)
        assert "process_group" in str(error) and "Every rank must pass" in str(error)


def construct_in_first_pair(rank: int) -> str:
    SyncBatchNorm(C, process_group=dist.new_group([0, 1]))
    return "constructed"


def test_without_running_statistics_evaluation_is_by_the_local_batch(pool: Pool) -> None:
    inputs, _ = make([3, 4], 2)
    for x, (y, collectives) in zip(inputs, pool.run(2, evaluate_untracked, inputs), strict=True):
        assert collectives == 0
        torch.testing.assert_close(y, F.batch_norm(x, None, None, training=True), rtol=1e-6, atol=1e-6)


def evaluate_untracked(rank: int, inputs: Sequence[Tensor]) -> tuple[Tensor, int]:
    made = SyncBatchNorm(C, affine=False, track_running_stats=False, dtype=torch.float64).eval()
    with Ledger(made) as ledger:
        return made(inputs[rank]), ledger.collectives
