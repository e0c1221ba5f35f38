"""What does exact synchronization cost over MPI, and over gloo? A ResNet-18 for 32x32 images under DDP.

Run ``launch/mpirun.sh 2 benchmarks/mpi.py`` on cores that nobody else uses: ranks that wait for MPI keep theirs busy.
Steps of all contenders alternate in one process; rank 0 prints medians and the exposed synchronization, which is a step
less the ``local_bn`` step beside it, as a Markdown table.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm.integrations import mpi

CONTENDERS = {
    "nn.BatchNorm2d": None,
    "local_bn": ("local_bn", "torch"),
    "sync_bn over gloo": ("sync_bn", "torch"),
    "sync_bn over MPI": ("sync_bn", "mpi"),
}


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        shortcut = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*shortcut) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions beside the shortcut."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet(width: int) -> nn.Sequential:
    """ResNet-18 without the initial pooling."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(4):
        for block in range(2):
            layers.append(Block(inputs, width << stage, 2 if stage and not block else 1))
            inputs = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def trainer(contender: tuple[str, str] | None, width: int, x: Tensor, labels: Tensor) -> Callable[[], float]:
    """A function that takes one training step and returns its milliseconds."""
    model = resnet(width)
    if contender is not None:
        recipe, transport = contender
        distnorm.convert(model, recipe, transport=transport)  # type: ignore[arg-type]
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> float:
        dist.barrier()
        started = time.perf_counter()
        optimizer.zero_grad()
        functional.cross_entropy(wrapped(x), labels).backward()
        optimizer.step()
        return (time.perf_counter() - started) * 1e3

    return step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Exact synchronization over MPI and over gloo.")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="images per rank")
    parser.add_argument("--runs", type=int, default=40, help="counted steps per contender")
    options = parser.parse_args()
    torch.set_num_threads(1)
    mpi.init_process_group()
    x = torch.randn(options.batch, 3, 32, 32, generator=torch.Generator().manual_seed(dist.get_rank()))
    labels = torch.arange(options.batch) % 10
    steps = {name: trainer(each, options.width, x, labels) for name, each in CONTENDERS.items()}
    rounds = [{name: step() for name, step in steps.items()} for _ in range(options.runs + 3)][3:]
    if dist.get_rank() == 0:
        print(
            f"{dist.get_world_size()} ranks, width {options.width}, batch {options.batch}, {platform.machine()}, ",
            end="",
        )
        print(f"torch {torch.__version__}, {date.today()}\n")
        print("| | step, ms | exposed, ms | step / nn.BatchNorm2d |\n|---|---:|---:|---:|")
        for name in steps:
            median = statistics.median(each[name] for each in rounds)
            exposed = statistics.median(each[name] - each["local_bn"] for each in rounds)
            ratio = statistics.median(each[name] / each["nn.BatchNorm2d"] for each in rounds)
            print(f"| {name} | {median:.1f} | {exposed:.1f} | {ratio:.2f} |")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
