"""One norm layer, forward and backward, without communication: summed over the layer shapes of a ResNet-18.

Run ``OMP_NUM_THREADS=1 python benchmarks/layer.py``. ``local_bn`` and stock take turns on the same tensors; a ratio is
that of the sums over all layers, round by round, with the median's 95 % interval.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from datetime import date

import torch
from measure import ratio, rounds
from models import norm_shapes
from torch import Tensor, nn

import distnorm

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
REPEATS = 5  # per layer and round: the fastest counts, for another program can only slow one down


def pass_through(layer: nn.Module, x: Tensor, dy: Tensor) -> float:
    """Milliseconds of one forward and backward."""
    x.grad = None
    started = time.perf_counter()
    layer(x).backward(dy)
    return (time.perf_counter() - started) * 1e3


def contender(recipe: str | None, shapes: Counter[tuple[int, int]], batch: int, format: str) -> Callable[[], float]:
    """A function that returns the milliseconds of all layers together."""
    cases: list[tuple[int, nn.Module, Tensor, Tensor]] = []
    for (channels, side), times in shapes.items():
        norm = nn.Sequential(nn.BatchNorm2d(channels))
        layer = norm[0] if recipe is None else distnorm.convert(norm, recipe)[0]
        x, dy = (torch.randn(batch, channels, side, side).to(memory_format=FORMATS[format]) for _ in range(2))
        cases.append((times, layer, x.requires_grad_(), dy))
    return lambda: sum(times * min(pass_through(*each) for _ in range(REPEATS)) for times, *each in cases)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Time norm layers without communication.")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=25, help="counted rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"batch {options.batch}, one thread, {platform.machine()}, torch {torch.__version__}, {date.today()}\n")
    print("| width | layout | stock, ms | `local_bn`, ms | ratio |\n|---:|---|---:|---:|---:|")
    for width in (32, 64):
        shapes = Counter(norm_shapes(width))
        for format in FORMATS:
            makers = {name or "stock": contender(name, shapes, options.batch, format) for name in (None, "local_bn")}
            seen = rounds(makers, options.runs)
            medians = (f"{statistics.median(values):.2f}" for values in seen.values())
            print(f"| {width} | {format} | {' | '.join(medians)} | {ratio(seen['local_bn'], seen['stock'])} |")


if __name__ == "__main__":
    main()
