"""The kernels for GPUs against float64, by the law of accuracy of tests/test_fused.py; and against plain autograd."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is made for Linux only")

from distnorm import fused
from distnorm.kernels.gpu import moments, tiles
from distnorm.kernels.gpu.apply import apply
from distnorm.kernels.gpu.combine import combine
from distnorm.kernels.gpu.cosums import BY_INPUT, BY_OUTPUT, cosums
from distnorm.methods import RMS, BatchNorm, ChannelAffine
from distnorm.share import KeepLocal
from distnorm.types import Affine
from tests.support.gpu import CUTS, DEVICES, cut_small, run_on, skip_without
from tests.test_fused import (
    EPS,
    Case,
    assert_within,
    cases,
    evaluate,
    exact,
    fused_path,
    laid_out,
    limits,
    numbers,
    plain_path,
)

# The interpreter computes with numpy, and also in lanes that nothing is kept of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]

METHODS = (BatchNorm(), RMS())
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from run_on(request.param)


@pytest.fixture(scope="module", params=CUTS)
def cut(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from cut_small(request.param)


def on(device: str, *tensors: Tensor) -> list[Tensor]:
    return [each.to(device) for each in tensors]


def judge(case: Case, device: str) -> None:
    tensors = on(device, *numbers(case))
    rounding = torch.finfo(case.dtype).eps if case.dtype in HALF else 0.0
    ours = evaluate(fused_path(case), *tensors)
    assert_within(ours, exact(case, *tensors), limits(case, *tensors[:3]), rounding=rounding)
    assert (ours.y.dtype, ours.dx.dtype) == (case.dtype, case.dtype)


@settings(max_examples=30)
@given(cases(torch.float32, *HALF, methods=METHODS))
def test_forward_and_backward_agree_with_float64(device: str, cut: str, case: Case) -> None:
    assume(torch.Size(case.shape).numel() <= 500)
    judge(case, device)


@pytest.mark.parametrize(
    "case",
    [
        Case((5, 1), mean=50.0),
        Case((1, 3, 7), mean=1e4),
        Case((2, 67, 1, 1), layout="channels_last", method=RMS()),
        Case((3, 1, 7, 5), layout="channels_last"),
        Case((2, 3, 2, 3, 5), layout="channels_last", dtype=torch.float16),
        Case((4, 2, 7, 7), values="outlier", dtype=torch.bfloat16),
        Case((1, 2, 3001), mean=50.0),
    ],
    ids=str,
)
def test_odd_sizes(device: str, case: Case) -> None:
    judge(case, device)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_many_channels(device: str, method: ChannelAffine, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(tiles, "COLUMNS", 2048)  # the interpreter takes its time for every program
    judge(Case((2, 4096), method=method), device)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(
    "shape", [(64, 64, 112, 112), (8, 2048, 7, 7), (33, 259, 13, 15), (4096, 4096), (3, 1, 999983)]
)
def test_large_tensors(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> None:
    skip_without("cuda")
    judge(Case(shape, layout, layout, mean=5.0, dtype=dtype), "cuda")


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5, 4), (2, 3, 0)])
def test_no_values(device: str, shape: tuple[int, ...], method: ChannelAffine) -> None:
    x, weight, bias = (torch.ones(size, device=device, requires_grad=True) for size in (shape, 3, 3))
    y = fused.normalize(method, x, KeepLocal(), Affine(weight, bias, EPS))
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_is_not_finite_stays_so_in_its_channel(device: str, layout: str, bad: float) -> None:
    x = numbers(Case((3, 5, 4, 4), layout=layout))[0].to(device)
    x[1, 2, 3, 3] = bad
    y = fused.normalize(BatchNorm(), x, KeepLocal(), Affine(None, None, EPS))
    assert y.isfinite().all((0, 2, 3)).tolist() == [True, True, False, True, True]
    assert y[:, 2].isnan().any()


def test_moments_of_large_means_keep_their_variance(device: str, cut: str) -> None:
    """A bare float32 sum of squares knows nothing of a variance of 1 at a mean of 1e4."""
    x = numbers(Case((16, 2, 5, 5), mean=1e4))[0].to(device)
    wire, pivot = moments.moments(x)
    mean, square = (wire[:-1] / wire[-1]).view(2, -1)
    truth = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(square - mean.square(), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(pivot.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    assert wire[-1] == 16 * 25


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_second_derivatives_are_those_of_the_plain_path(device: str, method: ChannelAffine) -> None:
    case = Case((4, 3, 5), method=method)
    x, dy, weight, bias = on(device, *numbers(case))
    found = []
    for path in (fused_path(case), plain_path(case)):
        leaves = [each.detach().requires_grad_() for each in (x, weight, bias)]
        first = torch.autograd.grad(path(*leaves), leaves, dy, create_graph=True)
        loss = sum((each * torch.linspace(-1, 2, each.numel(), device=device).view_as(each)).sum() for each in first)
        found.append((*first, *torch.autograd.grad(loss, leaves[:2])))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mask", [BY_INPUT, BY_OUTPUT])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fused_activation_and_residual(device: str, cut: str, dtype: torch.dtype, layout: str, mask: int) -> None:
    x, dy, weight, bias = on(device, *numbers(Case((4, 3, 5, 5), layout, layout, dtype=dtype)))
    adds = mask == BY_OUTPUT
    residual = laid_out(torch.randn(x.shape).to(dtype), layout).to(device) if adds else None
    wire, pivot = moments.moments(x)
    y, saved, narrow = apply(x, wire, pivot, weight, bias, residual, [], [], None, 0.0, EPS, 1.0, 0, 2, True)
    given = (pivot, weight, saved, narrow, 2, mask)
    cotangents, dweight, dbias = cosums(dy, x, y if adds else None, *given)
    dx, dresidual = combine(
        *(dy, x, y if adds else None, cotangents, wire[-1], pivot, saved, narrow, EPS, 2, mask, adds)
    )
    leaves = [each.double().requires_grad_() for each in (x, weight, bias)]
    wide_residual = torch.zeros_like(leaves[0]) if residual is None else residual.double()
    wide_residual.requires_grad_()
    before = F.batch_norm(leaves[0], None, None, *leaves[1:], True, 0.0, EPS) + wide_residual
    # The mask of the rounded output: within rounding of 0 either is right.
    truth = before * (y > 0)
    expected = torch.autograd.grad(truth, [*leaves, wide_residual], dy.double())
    assert ((before.abs() < 1e-2) | ((before > 0) == (y > 0))).all()
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype in HALF else {"rtol": 1e-4, "atol": 1e-5}
    ours = [dx, dweight, dbias] + ([dresidual] if adds else [])
    for value, wanted in zip([y, *ours], [truth.clamp_min(0), *expected], strict=False):
        torch.testing.assert_close(value.double(), wanted, **tolerance)


@pytest.mark.parametrize("shape", [(64, 64, 112, 112), (2, 2048, 7, 7), (8, 3, 5), (1, 1), (7, 4096), (3, 1, 9999999)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_tiles_cover_every_value_once(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x = torch.empty(shape, device="meta")
    x = x.to(memory_format=memory_format) if x.dim() == 4 else x
    (blocks, splits), (outer, units, channels, count, planes, vector, rows, columns) = tiles.tiles_of(x)
    assert outer * units * vector * channels == x.numel()
    assert count == -(-outer // rows) * (-(-units * vector // columns) if planes else 1)
    assert blocks == (channels if planes else -(-channels // columns))
    assert rows * columns <= tiles.TILE and splits <= count <= splits * max(tiles.LONGEST, 1) + splits
    assert all(each & (each - 1) == 0 for each in (rows, columns))
    for one, other in pairwise((1, splits, 65536)):
        assert one <= other
