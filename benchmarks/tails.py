"""One norm layer and what follows it, forward and backward: in one call, or apart, over the layer shapes of ResNet-18.

Run ``OMP_NUM_THREADS=1 python benchmarks/tails.py``. Apart, the addition and the ReLU work in place, as in most models.
Times and ratios as in ``benchmarks/layer.py``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from layer import FORMATS, REPEATS
from measure import finish, markdown, milliseconds, parser_of, ratio, rounds
from models import norm_shapes
from torch import Tensor, nn
from torch.nn import functional

import distnorm

TAILS = {"ReLU": False, "addition and ReLU": True}
Run = Callable[[Tensor, Tensor | None], Tensor]


def apart(layer: nn.Module) -> Run:
    """``relu(layer(x) + residual)``, step by step."""

    def run(x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = layer(x)
        if residual is not None:
            y += residual
        return functional.relu(y, inplace=True)

    return run


def contenders(channels: int) -> dict[str, Run]:
    """Ways to do the same."""
    ours = distnorm.convert(nn.Sequential(nn.BatchNorm2d(channels)), "local_bn")[0]
    return {
        "stock": apart(nn.BatchNorm2d(channels)),
        "apart": apart(ours),
        "fused": lambda x, residual: ours(x, residual=residual, relu=True, widen=False),
    }


def passing(run: Run, shape: tuple[int, int, int, int], format: str, adds: bool) -> Callable[[], float]:
    """A function that returns the milliseconds of one forward and backward."""
    x, residual, dy = (torch.randn(shape).to(memory_format=FORMATS[format]).requires_grad_() for _ in range(3))
    added, dy = residual if adds else None, dy.detach()

    def once() -> float:
        x.grad = residual.grad = None
        started = time.perf_counter()
        run(x, added).backward(dy)
        return (time.perf_counter() - started) * 1e3

    return once


def layers(name: str, shapes: Counter[tuple[int, int]], batch: int, format: str, adds: bool) -> Callable[[], float]:
    """A function that returns the milliseconds of all layers together."""
    cases = [
        (times, passing(contenders(channels)[name], (batch, channels, side, side), format, adds))
        for (channels, side), times in shapes.items()
    ]
    return lambda: sum(times * min(once() for _ in range(REPEATS)) for times, once in cases)


def table(cases: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row per tail, layout and width."""
    rows = []
    for case in cases:
        ms = case["ms"]
        figures = [*map(milliseconds, (ms["stock"], ms["apart"], ms["fused"]))]
        ratios = [str(ratio(ms["fused"], ms[other])) for other in ("apart", "stock")]
        rows.append([case["tail"], case["format"], str(case["width"]), *figures, *ratios])
    titles = ["then", "layout", "width", "stock, ms", "`local_bn`, apart, ms", "fused, ms", "over apart", "over stock"]
    return markdown(titles, rows, 3)


def main() -> None:
    """Measure and print."""
    parser = parser_of("Time norm layers with what follows them.", runs=25)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = []
    for width in options.widths:
        shapes = Counter(norm_shapes(width))
        for tail, adds in TAILS.items():
            for format in FORMATS:
                makers = {
                    name: layers(name, shapes, options.batch, format, adds) for name in ("stock", "apart", "fused")
                }
                cases.append({"width": width, "format": format, "tail": tail, "ms": rounds(makers, options)})
    finish({"batch": options.batch, "cases": cases}, table(cases), options.json)


if __name__ == "__main__":
    main()
