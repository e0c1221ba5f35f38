"""Torch's batch norm for small layers that share nothing: it changes when Python runs, and nothing that users see."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import distnorm
from distnorm.kernels import stock

SHAPE = 4, 6, 3, 5


def _train(options: dict[str, object], spoil: Callable[[nn.Module], None], run: Callable[..., Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(SHAPE[1], **options)  # type: ignore[arg-type]
    spoil(layer)
    model = distnorm.convert(nn.Sequential(layer), "sync_bn")
    found = []
    for _ in range(3):
        x = (torch.randn(SHAPE) * 3 + 2).requires_grad_()
        y = run(model, x)
        y.square().sum().backward()
        assert x.grad is not None
        found += [y, x.grad]
    return found + [each for each in (*layer.parameters(), *layer.buffers(), layer.weight) if each is not None]


def _without_count(layer: nn.Module) -> None:
    layer.num_batches_tracked = None


def _nothing(layer: nn.Module) -> None:
    pass


@pytest.mark.parametrize(
    ("options", "spoil"),
    [
        ({}, _nothing),
        ({"momentum": None}, _nothing),
        ({"momentum": 0.3}, _without_count),
        ({"affine": False}, _nothing),
        ({"track_running_stats": False}, _nothing),
        ({"eps": 0.1}, _nothing),
    ],
)
@pytest.mark.parametrize("checkpointed", [False, True])
def test_as_the_kernels_do(
    options: dict[str, object],
    spoil: Callable[[nn.Module], None],
    checkpointed: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
        assert isinstance(y, Tensor)
        return y

    small = _train(options, spoil, run)
    monkeypatch.setattr(stock, "FEW_VALUES", 0)
    for one, other in zip(small, _train(options, spoil, run), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}])
def test_to_the_bit_what_torch_computes(options: dict[str, object]) -> None:
    torch.manual_seed(0)
    torchs, x = nn.BatchNorm2d(SHAPE[1], **options), torch.randn(SHAPE)  # type: ignore[arg-type]
    ours = distnorm.convert(nn.Sequential(nn.BatchNorm2d(SHAPE[1], **options)), "local_bn")  # type: ignore[arg-type]
    for _ in range(3):
        assert torch.equal(torchs(x), ours(x))
    assert all(torch.equal(one, other) for one, other in zip(torchs.buffers(), ours.buffers(), strict=True))
