"""One norm layer, forward and backward, without communication: summed over the layer shapes of a ResNet-18.

Run ``OMP_NUM_THREADS=1 python benchmarks/layer.py``. ``local_bn`` and stock take turns on the same tensors; a ratio is
that of the sums over all layers, round by round, with the median's 95 % interval.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from measure import finish, markdown, milliseconds, parser_of, ratio, rounds
from models import norm_shapes
from torch import Tensor, nn

import distnorm
from distnorm.kernels import cpu

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
    cases: list[tuple[int, tuple[nn.Module, Tensor, Tensor]]] = []
    for (channels, side), times in shapes.items():
        norm = nn.Sequential(nn.BatchNorm2d(channels))
        layer = norm[0] if recipe is None else distnorm.convert(norm, recipe)[0]
        x, dy = (torch.randn(batch, channels, side, side).to(memory_format=FORMATS[format]) for _ in range(2))
        cases.append((times, (layer, x.requires_grad_(), dy)))

    def one_round() -> float:
        fastest = [(times, min(pass_through(*each) for _ in range(REPEATS))) for times, each in cases]
        return sum(times * each for times, each in fastest)

    return one_round


def loops_alone(x: Tensor, dy: Tensor) -> float:
    """Milliseconds of the four loops of a forward and backward, without autograd, module and C-sized arithmetic."""
    a_C = torch.ones(x.shape[1])
    started = time.perf_counter()
    cpu.moments(x)
    cpu.apply(x, a_C, a_C, a_C)
    cpu.cosums(dy, x, a_C)
    cpu.combine(dy, x, a_C, a_C, a_C, a_C)
    return (time.perf_counter() - started) * 1e3


def floor(shapes: Counter[tuple[int, int]], batch: int, format: str) -> Callable[[], float]:
    """As ``contender``, for the loops alone."""
    cases = [
        (times, [torch.randn(batch, channels, side, side).to(memory_format=FORMATS[format]) for _ in range(2)])
        for (channels, side), times in shapes.items()
    ]
    return lambda: sum(times * min(loops_alone(*pair) for _ in range(REPEATS)) for times, pair in cases)


def table(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row per width and layout."""
    rows = []
    for case in cases:
        ours, stock = case["ms"]["local_bn"], case["ms"]["stock"]
        loops = case["ms"]["loops"]
        figures = [*map(milliseconds, (stock, loops, ours)), str(ratio(loops, stock)), str(ratio(ours, stock))]
        rows.append([case["format"], str(case["width"]), *figures])
    return markdown(
        [
            "layout",
            "width",
            "stock, ms",
            "loops alone, ms",
            "`local_bn`, ms",
            "loops over stock",
            "`local_bn` over stock",
        ],
        rows,
    )


def main() -> None:
    """Measure and print."""
    parser = parser_of("Time norm layers without communication.", runs=25)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for width in options.widths:
        shapes = Counter(norm_shapes(width))
        for format in FORMATS:
            makers = {name or "stock": contender(name, shapes, options.batch, format) for name in (None, "local_bn")}
            makers["loops"] = floor(shapes, options.batch, format)
            cases.append({"width": width, "format": format, "ms": rounds(makers, options)})
    finish({"batch": options.batch, "cases": cases}, table(cases), options.json)


if __name__ == "__main__":
    main()
