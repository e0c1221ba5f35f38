"""``sync_bn(overlap=True)``: the same gradients in another order, so that weight gradients hide collectives."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import distnorm
from distnorm.layers.overlap import LateConv
from tests.support.pool import Pool

Model = Callable[[Tensor], Tensor]


class Residual(nn.Module):
    """Norms before a convolution, before two, before none; in-place activation; a bias; groups; a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norm0 = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, stride=2, dilation=2, padding=2)
        self.norm2 = nn.BatchNorm2d(4)
        self.down = nn.Conv2d(4, 4, 1, stride=2, bias=False)
        self.norm3 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm0(self.stem(x)))
        y = torch.relu_(self.norm1(self.conv1(self.norm1(self.conv1(x)))))
        y = torch.relu(self.norm2(self.conv2(y)) + self.norm3(self.down(x)))
        return self.head(y.mean((2, 3)))


def data(rank: int) -> Tensor:
    return torch.randn(3 + rank, 3, 8, 8, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def gradients(rank: int, kind: str, overlap: bool) -> list[Tensor]:
    torch.manual_seed(0)
    net = distnorm.convert(Residual().double(), "sync_bn", overlap=overlap)
    assert any(isinstance(each, LateConv) for each in net.modules()) is overlap
    model: Model = net
    if kind == "ddp":
        model = DistributedDataParallel(net)
    elif kind in ("reentrant", "checkpointed"):
        model = lambda x: checkpoint(net, x, use_reentrant=kind == "reentrant")  # noqa: E731
    elif kind == "frozen":
        net.conv2.weight.requires_grad_(False)
    x = data(rank).requires_grad_()
    for _ in range(2):
        loss = model(x).square().sum()
        if kind == "double":
            (dx,) = torch.autograd.grad(loss, x, create_graph=True)
            dx.square().sum().backward()
        elif kind == "inputs only":
            torch.autograd.grad(loss, x, retain_graph=True)
            loss.backward()
        else:
            loss.backward()
    found = [x.grad, *(each.grad for each in net.parameters()), *net.buffers()]
    return [each for each in found if each is not None]


@pytest.mark.parametrize("kind", ["plain", "ddp", "reentrant", "checkpointed", "double", "inputs only", "frozen"])
def test_gradients_are_those_of_the_plain_order(pool: Pool, kind: str) -> None:
    late, plain = (pool.run(2, gradients, kind, overlap) for overlap in (True, False))
    for ours, expected in zip(late, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_two_ranks_are_one_with_the_joined_batch(pool: Pool) -> None:
    ranks = pool.run(2, gradients, "plain", True)
    torch.manual_seed(0)
    net = Residual().double()
    x = torch.cat([data(0), data(1)]).requires_grad_()
    for _ in range(2):
        net(x).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(torch.cat([each[0] for each in ranks]), x.grad, rtol=1e-9, atol=1e-9)
    for index, parameter in enumerate(net.parameters(), 1):
        assert parameter.grad is not None
        torch.testing.assert_close(ranks[0][index] + ranks[1][index], parameter.grad, rtol=1e-9, atol=1e-9)


def order(rank: int) -> list[str]:
    """What a backward pass does, in order: collectives as they start and as they are waited for, weight gradients."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).double()
    distnorm.convert(net, "sync_bn", overlap=True)
    output = net(data(rank)).sum()
    seen: list[str] = []

    class Observer(distnorm.Ledger):
        def issued(self, slot: object, nbytes: int) -> None:
            seen.append("start")

        def waited(self, slot: object, seconds: float) -> None:
            seen.append("wait")

    net[3].weight.register_hook(lambda _: seen.append("weight gradient"))
    with Observer(net):
        output.backward()
    return seen


def test_the_weight_gradient_comes_while_the_collective_is_under_way(pool: Pool) -> None:
    for seen in pool.run(2, order):
        first, gradient, last = (seen.index("start"), seen.index("weight gradient"), len(seen) - 1)
        assert first < gradient < last
        assert seen[-1] == "wait"


def test_revert_and_copies_leave_nothing_behind() -> None:
    net = distnorm.convert(Residual(), "sync_bn", overlap=True)
    copied = copy.deepcopy(net)
    assert copied.norm0.__dict__["_follower"] is copied.conv1
    distnorm.revert(net)
    assert all(type(each).__module__.startswith(("torch.", "tests.")) for each in net.modules())
    assert not any({"_follower", "_arranged"} & set(vars(each)) for each in net.modules())
    assert set(net.state_dict()) == set(Residual().state_dict())


def autocast(rank: int) -> tuple[torch.dtype, torch.dtype]:
    net = distnorm.convert(Residual(), "sync_bn", overlap=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = net(data(rank).float())
    output.float().sum().backward()
    assert net.conv1.weight.grad is not None
    return output.dtype, net.conv1.weight.grad.dtype


def test_autocast_steps_aside(pool: Pool) -> None:
    assert pool.run(2, autocast) == [(torch.bfloat16, torch.float32)] * 2
