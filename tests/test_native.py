"""The C: its loops against float64, and doing without it. How it is built and kept: test_library_cache.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import distnorm
from distnorm.kernels import arithmetic, cpu, native, stock

# Whole and broken vectors, blocks of planes (4,096 values) and of rows (64 x 64), and enough for threads.
SHAPES = [
    (3, 2, 5),
    (2, 3, 70, 70),
    (5, 70, 7, 7),
    (9, 130),
    (70, 64),
    (2, 65, 3, 5, 7),
    (17, 129, 4, 4),
    (1, 1, 2),
    (4, 64, 33, 31),
]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def tensors(shape: tuple[int, ...], layout: str) -> list[Tensor]:
    """x, dy, and 4 vectors of the channels."""
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last_3d if layout == "channels_last" and len(shape) == 5 else LAYOUTS[layout]
    images = [torch.randn(shape, generator=generator) + 3 for _ in range(2)]
    if len(shape) > 3:
        images = [each.to(memory_format=memory_format) for each in images]
    return [*images, *torch.rand(4, shape[1], generator=generator)]


def wide(values_C: Tensor, x_NCL: Tensor) -> Tensor:
    return values_C.double().view(1, -1, *(1,) * (x_NCL.dim() - 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loops_agree_with_float64(shape: tuple[int, ...], layout: str, threads: int) -> None:
    x, dy, pivot, scale, level, slope = tensors(shape, layout)
    assert cpu.loops(x) is not None
    dims = [dim for dim in range(x.dim()) if dim != 1]
    count = x.numel() // shape[1]
    payload, mean, _ = cpu.moments(x)
    raw = torch.cat((x.double().sum(dims), x.double().square().sum(dims)))
    torch.testing.assert_close(payload[:-1], raw, rtol=3e-7, atol=0)
    assert payload[-1] == count
    torch.testing.assert_close(mean.double(), raw[: shape[1]] / count, rtol=1e-6, atol=0)
    centred = x.double() - wide(pivot, x)
    sums = torch.stack((dy.double().sum(dims), (dy.double() * centred).sum(dims)))
    torch.testing.assert_close(cpu.cosums(dy, x, pivot), sums, rtol=1e-5, atol=1e-6 * count)
    y = centred * wide(scale, x) + wide(level, x)
    torch.testing.assert_close(cpu.apply(x, pivot, scale, level).double(), y, rtol=1e-6, atol=1e-6)
    dx = dy.double() * wide(scale, x) + wide(level, x) + centred * wide(slope, x)
    torch.testing.assert_close(cpu.combine(dy, x, pivot, scale, level, slope).double(), dx, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("adds", [False, True], ids=["relu", "addition and relu"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tails_agree_with_float64(
    shape: tuple[int, ...], layout: str, threads: int, adds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "FEW_VALUES", 0)
    x, dy, weight, bias, *_ = tensors(shape, layout)
    residual = (tensors(shape, layout)[1] - 3) * adds
    layer = distnorm.convert(nn.SyncBatchNorm(shape[1]), "local_bn")
    layer.weight.data.copy_(weight)
    layer.bias.data.copy_(bias)
    leaves = [each.requires_grad_() for each in (x, residual)]
    y = layer(x, residual=residual if adds else None, relu=True)
    found = torch.autograd.grad(y, [x, *leaves[1:] * adds, layer.weight, layer.bias], dy)
    wide_leaves = [each.detach().double().requires_grad_() for each in (x, residual, weight, bias)]
    norm = functional.batch_norm(wide_leaves[0], None, None, *wide_leaves[2:], training=True)
    total = norm + wide_leaves[1]
    torch.testing.assert_close(y.double(), total.relu(), rtol=1e-5, atol=2e-5)
    truth = torch.autograd.grad(total, wide_leaves, dy.double() * (y > 0))  # which sign, may hinge on rounding
    for one, other in zip(found, [truth[0], *truth[1:2] * adds, *truth[2:]], strict=True):
        summed = x.numel() // shape[1] if one.dim() == 1 else 1
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-5 + 1e-6 * summed)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_stays_so_in_its_channel(layout: str, bad: float) -> None:
    x = tensors((4, 3, 6, 6), layout)[0]
    x[1, 1, 2, 3] = bad
    layer = distnorm.convert(nn.Sequential(nn.BatchNorm2d(3)), "local_bn")[0]
    y = layer(x)
    assert y[:, 1].isnan().any()
    assert y[:, [0, 2]].isfinite().all()
    assert layer.running_var.isfinite().tolist() == [True, False, True]


def test_running_statistics_that_autograd_needs_are_not_changed_unseen() -> None:
    layer = distnorm.convert(nn.Sequential(nn.BatchNorm1d(3)), "local_bn")[0]
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    y = layer.eval()(x)
    layer.train()(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# --- doing without it -----------------------------------------------------------------------------


def build() -> object:
    return native.library.__wrapped__()


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTNORM_KERNELS", "aten")
    assert build() is None
    monkeypatch.setenv("DISTNORM_KERNELS", "fast")
    with pytest.raises(
        ValueError, match=r'DISTNORM_KERNELS=\'fast\': allowed are "compiled" \(the default\) and "aten"'
    ):
        build()


def test_which_parameters_the_arithmetic_reads() -> None:
    assert arithmetic.plain(None) and arithmetic.plain(torch.ones(3))
    assert not arithmetic.plain(torch.ones(3, dtype=torch.bfloat16))
    assert not arithmetic.plain(torch.ones(6)[::2])
