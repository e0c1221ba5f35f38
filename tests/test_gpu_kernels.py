"""The kernels for GPUs against float64, by the law of accuracy of tests/support/cases.py, and plain autograd."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton is made for Linux only")

from distnorm.autograd import normalize
from distnorm.autograd.keep_local import KeepLocal
from distnorm.kernels.gpu import cosums, moments, tiles
from distnorm.kernels.gpu.gpu_pass import GpuPass
from distnorm.methods import RMS, BatchNorm, ChannelAffine
from distnorm.types import RELU, Affine, Epilogue
from tests.support.cases import (
    EPS,
    LAYOUTS,
    REFERENCES,
    Case,
    Result,
    assert_within,
    drawn,
    error,
    evaluate,
    exact,
    fused_path,
    laid_out,
    limits,
    numbers,
    plain_path,
)
from tests.support.gpu import CUTS, DEVICES, cut_small, run_on, skip_without
from tests.support.interpreter import INTERPRETED
from tests.support.thinned import thinned

pytestmark = INTERPRETED

METHODS = (BatchNorm(), RMS())
HALF = (torch.bfloat16, torch.float16)
DRAWN = drawn(30, torch.float32, *HALF, methods=METHODS, most=500)
SIZES = {name: getattr(tiles, name) for name in ("TILE", "COLUMNS", "PROGRAMS")}


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from run_on(request.param)


@pytest.fixture(scope="module", params=CUTS)
def cut(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from cut_small(request.param)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles as they are, whatever ``cut`` left for other tests of this module."""
    for name, size in SIZES.items():
        monkeypatch.setattr(tiles, name, size)


def on(device: str, *tensors: Tensor) -> list[Tensor]:
    return [each.to(device) for each in tensors]


def judge(case: Case, device: str) -> None:
    tensors = on(device, *numbers(case))
    rounding = torch.finfo(case.dtype).eps if case.dtype in HALF else 0.0
    ours = evaluate(fused_path(case), *tensors)
    assert_within(ours, exact(case, *tensors), limits(case, *tensors[:3]), rounding=rounding)
    assert (ours.y.dtype, ours.dx.dtype) == (case.dtype, case.dtype)


@pytest.mark.parametrize("case", thinned(DRAWN, every=4), ids=str)
def test_forward_and_backward_agree_with_float64(device: str, cut: str, case: Case) -> None:
    judge(case, device)


@pytest.mark.usefixtures("whole")
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


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_many_channels(device: str, method: ChannelAffine, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setattr(tiles, "COLUMNS", 2048)  # the interpreter takes its time for every program
        for module in (moments, cosums):
            monkeypatch.setattr(module, "MERGE_COLUMNS", 2048)
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
    y = normalize.normalize(method, x, KeepLocal(), Affine(weight, bias, EPS))
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_what_is_not_finite_stays_so_in_its_channel(device: str, layout: str, bad: float) -> None:
    x = numbers(Case((3, 5, 4, 4), layout=layout))[0].to(device)
    x[1, 2, 3, 3] = bad
    y = normalize.normalize(BatchNorm(), x, KeepLocal(), Affine(None, None, EPS))
    assert y.isfinite().all((0, 2, 3)).tolist() == [True, True, False, True, True]
    assert y[:, 2].isnan().any()


def test_moments_of_large_means_keep_their_variance(device: str, cut: str) -> None:
    """A bare float32 sum of squares knows nothing of a variance of 1 at a mean of 1e4."""
    x = numbers(Case((16, 2, 5, 5), mean=1e4))[0].to(device)
    payload, pivot = moments.moments(x)
    mean, square = (payload[:-1] / payload[-1]).view(2, -1)
    truth = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(square - mean.square(), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(pivot.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    assert payload[-1] == 16 * 25


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


# --- epilogues: relu(norm(x) + residual) -------------------------------------------------------------

KINDS = [(None, True), *itertools.product(LAYOUTS, (True, False))]
"""The residual's layout, if there is one, and whether there is a ReLU."""


def with_tail(case: Case, epilogue: Epilogue, *tensors: Tensor) -> tuple[Result, Tensor]:
    """All results of ``GpuPass``, and the gradient before the activation."""
    x, dy, weight, bias = tensors
    formula = case.method.formula(Affine(weight, bias, EPS))
    kernels = GpuPass(formula, EPS)
    y = kernels.normalize(x, kernels.sums(x), weight, bias, epilogue, None)
    cotangents, dweight, dbias, dz = kernels.pull(dy, x, y if epilogue.activation else None, weight)
    return Result(y, kernels.combine(dz, x, cotangents), dweight, dbias), dz


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        *thinned(zip(DRAWN, itertools.cycle(KINDS)), every=4),
        (Case((4, 2, 7, 7), dtype=torch.bfloat16), ("channels_last", True)),
        (Case((2, 67, 1, 1), layout="channels_last"), (None, True)),
    ],
    ids=str,
)
def test_tails_agree_with_float64(device: str, cut: str, case: Case, kind: tuple[str | None, bool]) -> None:
    layout, relu = kind
    tensors = x, dy, weight, bias = on(device, *numbers(case))
    other = case._replace(layout=layout, mean=0.0, values="normal", seed=case.seed + 1)
    added = None if layout is None else numbers(other)[0].to(device)
    ours, dz = with_tail(case, Epilogue(added, *[RELU] * relu), *tensors)

    leaves = x, weight, bias = [each.double().requires_grad_() for each in (x, weight, bias)]
    residual = (torch.zeros_like(x) if added is None else added.double()).requires_grad_()
    before = REFERENCES[type(case.method)]([x], weight, bias, eps=EPS).outputs[0] + residual
    # Within rounding of 0 the mask of the rounded output is as right as that of the exact one.
    passes = (ours.y > 0) | (not relu)
    expected = torch.autograd.grad(torch.where(passes, before, 0), [*leaves, residual], dy.double())
    rounding, allowed = torch.finfo(case.dtype).eps, limits(case, *tensors[:3])
    truth = Result(torch.relu(before).detach() if relu else before.detach(), *expected[:3])
    assert_within(ours, truth, allowed, rounding=rounding)
    wrong = torch.where(passes != ((before > 0) | (not relu)), before, 0)
    assert (error(wrong, torch.zeros_like(wrong)) <= allowed.y + rounding * before.abs().max()).all()
    if not relu or added is not None:  # it is the residual's gradient
        assert torch.equal(dz.double(), expected[3])
    assert {each.dtype for each in (ours.y, ours.dx, dz)} == {case.dtype}


@pytest.mark.parametrize(("adds", "relu"), [(False, True), (True, False), (True, True)])
def test_tails_reach_autograd(device: str, adds: bool, relu: bool) -> None:
    x, dy, weight, bias = on(device, *numbers(Case((4, 3, 5, 5))))
    leaves = [x, weight, bias, *[dy.flip(0)] * adds]
    traces = []
    for wide in (False, True):
        inputs = [(each.double() if wide else each).detach().requires_grad_() for each in leaves]
        added = inputs[3] if adds else None
        if wide:
            y = F.batch_norm(inputs[0], None, None, *inputs[1:3], True, 0.0, EPS)
            y = y if added is None else y + added
            y = y.relu() if relu else y
        else:
            affine = Affine(inputs[1], inputs[2], EPS)
            y = normalize.normalize(
                BatchNorm(), inputs[0], KeepLocal(), affine, epilogue=Epilogue(added, *[RELU] * relu)
            )
        traces.append((y, *torch.autograd.grad(y, inputs, dy.to(y.dtype))))
    for ours, truth in zip(*traces, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adds", [False, True])
def test_what_was_rounded_to_0_has_no_gradient(device: str, adds: bool) -> None:
    """Outputs about the smallest number of float16, by a weight as small."""
    case = Case((4, 3, 5, 5), dtype=torch.float16)
    x, dy, _, bias = on(device, *numbers(case))
    weight = torch.full_like(bias, 3e-8)
    epilogue = Epilogue(torch.zeros_like(x) if adds else None, RELU)
    ours, dz = with_tail(case, epilogue, x, dy, weight, torch.zeros_like(bias))
    before = (x.double() - x.double().mean((0, 2, 3), keepdim=True)) > 0
    assert before[ours.y > 0].all() and (before & (ours.y == 0)).any() and (ours.y > 0).any()
    passed = torch.where(ours.y > 0, dy, 0)
    torch.testing.assert_close(ours.dbias.double(), passed.double().sum((0, 2, 3)), rtol=1e-6, atol=1e-6)
    assert torch.equal(dz, passed if adds else dy)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("place", ["x", "residual", "x, without a residual"])
def test_gradients_pass_where_the_output_is_nan(device: str, place: str, layout: str) -> None:
    """As in torch's own ReLU."""
    case = Case((3, 2, 4, 4), layout, layout)
    x, dy, weight, bias = on(device, *numbers(case))
    residual = laid_out(torch.linspace(-1, 2, x.numel()).view(x.shape), layout).to(device)
    (residual if place == "residual" else x)[1, 0, 2, 3] = float("nan")
    epilogue = Epilogue(None if "without" in place else residual, RELU)
    ours, dz = with_tail(case, epilogue, x, dy, weight, bias)
    leaves = [each.double().requires_grad_() for each in (x, weight, bias, residual)]
    before = F.batch_norm(leaves[0], None, None, *leaves[1:3], True, 0.0, EPS)
    truth = torch.relu(before if epilogue.residual_NCL is None else before + leaves[3])
    expected = torch.autograd.grad(truth, leaves, dy.double(), allow_unused=True)
    for value, wanted in zip((*ours, dz), (truth, *expected), strict=True):
        if wanted is not None:
            torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert ours.dbias.isfinite().all() and truth.isnan().any()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize(("adds", "relu"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 5, 4), (2, 3, 0)])
def test_tails_of_no_values(device: str, shape: tuple[int, ...], adds: bool, relu: bool, method: ChannelAffine) -> None:
    x, weight, bias = (torch.ones(size, device=device) for size in (shape, 3, 3))
    ours, dz = with_tail(Case(shape, method=method), Epilogue(x if adds else None, *[RELU] * relu), x, x, weight, bias)
    assert ours.y.shape == ours.dx.shape == dz.shape == x.shape
    assert not ours.dweight.any() and not ours.dbias.any()
