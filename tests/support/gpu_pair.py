"""Two ranks on one device over gloo: ``sync_bn`` on the GPU kernels against the joined batch. For torchrun."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

import distnorm
from tests.support.gpu import run_on

SIZES = (3, 5), (4, 0)
"""What the ranks have of each batch."""


def check(device: str) -> None:
    """Two steps; the second is empty on one rank."""
    rank = dist.get_rank()
    ours = distnorm.convert(nn.BatchNorm2d(3), "sync_bn").to(device)
    stock = nn.BatchNorm2d(3).to(device)
    for sizes in SIZES:
        torch.manual_seed(0)
        x, dy = torch.randn(2, sum(sizes), 3, 4, 5).add(2).to(device).unbind()
        whole = x.clone().requires_grad_()
        part, mine = x.split(sizes)[rank].clone().requires_grad_(), slice(sizes[0] * rank, sum(sizes[: rank + 1]))
        expected, y = stock(whole), ours(part)
        expected.backward(dy)
        y.backward(dy[mine])
        torch.testing.assert_close(y, expected[mine])
        assert whole.grad is not None
        torch.testing.assert_close(part.grad, whole.grad[mine])
    for one, two in zip(ours.parameters(), stock.parameters(), strict=True):
        assert one.grad is not None
        dist.all_reduce(one.grad)
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4)
    for ours_now, stock_now in zip(ours.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(ours_now, stock_now)


def main() -> None:
    """Check on the device that is named."""
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2
    with contextmanager(run_on)(sys.argv[1]):
        check(sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
