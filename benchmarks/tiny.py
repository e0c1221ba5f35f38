"""Norm layers of almost no values, forward and backward: what the host does, whatever the device is.

Run ``OMP_NUM_THREADS=1 python benchmarks/tiny.py``, or under ``torchrun --standalone --nproc_per_node 2``, where ranks
of one host share memory. A contender is a model of ``LAYERS`` such layers in a row, and its time is divided by their
number, so ``mabn`` and ``lazy_bn`` end one step for all of them. Contenders take turns on the same tensors; a round's
time is the fastest of several passes. *Frames* are the calls of Python functions, forward and backward, that a model of
one layer makes beyond those of stock: those of the end of its step are among them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import FrameType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from layer import pass_through
from measure import finish, markdown, parser_of, ratio, rounds
from peers import GatherNorm, replace_norms
from torch import Tensor, nn

import distnorm
from distnorm.integrations import mpi
from distnorm.kernels import stock

SHAPE = 2, 8, 2, 2
LAYERS = 16
RECIPES = "local_bn", "sync_bn", "mabn", "lazy_bn"
REPEATS = 8  # passes per round: the fastest counts, for another program can only slow one down
WARM = 120  # passes: the recipes' warm-up, of 100 steps, is over
CORRECTED = 1000  # updates after which ``mabn`` corrects by its running statistics

Frames = tuple[int, int]


def model_of(contender: str, layers: int = LAYERS) -> nn.Module:
    """``stock``, ``gather``, or a recipe, in its steady state."""
    model = nn.Sequential(*(nn.BatchNorm2d(SHAPE[1]) for _ in range(layers)))
    if contender == "gather":
        return replace_norms(model, GatherNorm)
    model = model if contender == "stock" else distnorm.convert(model, contender)
    for layer in model:
        layer.num_batches_tracked.fill_(CORRECTED)
    x, dy = tensors()
    for _ in range(WARM):
        model(x).backward(dy)
    return model


def tensors() -> tuple[Tensor, Tensor]:
    """An input, and a gradient of the output."""
    return torch.randn(*SHAPE, requires_grad=True), torch.randn(*SHAPE)


def frames(model: nn.Module) -> Frames:
    """How many Python functions a forward and a backward call: the least of a few, for a collector may call others."""
    x, dy = tensors()
    found = []
    for _ in range(5):
        y, forward = _counted(lambda: model(x))
        found.append((forward, _counted(partial(y.backward, dy))[1]))
    return min(each[0] for each in found), min(each[1] for each in found)


def _counted(work: Callable[[], Any]) -> tuple[Any, int]:
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        result = work()
    finally:
        sys.setprofile(None)
    return result, calls


def beyond_stock(contender: str) -> Frames:
    """What a layer of ``contender`` calls beyond what a stock one does."""
    ours, stock = frames(model_of(contender, 1)), frames(model_of("stock", 1))
    return ours[0] - stock[0], ours[1] - stock[1]


@contextmanager
def no_network() -> Iterator[None]:
    """Collectives of torch's that return at once, with this rank's values in place of the others'."""

    def gather(answers: Tensor, told: Tensor) -> None:
        answers.view(-1, told.numel()).copy_(told)

    with mock.patch.multiple(dist, all_gather_single=gather, all_reduce=lambda values: None):
        yield


def kernels_only() -> AbstractContextManager[Any]:
    """Small layers that share nothing, too, take the C kernels in an autograd Function."""
    return mock.patch.object(stock, "FEW_VALUES", 0)


def contender(model: nn.Module, within: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Callable[[], float]:
    """A function that returns the milliseconds of a layer in the fastest pass, ``within`` a context."""
    x, dy = tensors()

    def one_round() -> float:
        with within():
            return min(pass_through(model, x, dy) for _ in range(REPEATS)) / LAYERS

    return one_round


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row per contender and number of ranks."""
    rows = []
    for result in results:
        ms, counted = result["ms"], result["frames"]
        for name, values in ms.items():
            microseconds = f"{sorted(values)[len(values) // 2] * 1e3:.0f}"
            over = [str(ratio(values, ms[base])) if name != base else "" for base in ("stock", "gather, no network")]
            calls = "{} + {}".format(*counted[name]) if name in counted else ""
            rows.append(
                [name if name not in RECIPES else f"`{name}`", str(result["ranks"]), microseconds, *over, calls]
            )
    titles = ["", "ranks", "forward and backward, µs", "over stock", "over gather without network", "frames"]
    return markdown(titles, rows)


def main() -> None:
    """Measure and print."""
    options = parser_of("Time norm layers of almost no values.", runs=40).parse_args()
    torch.set_num_threads(1)
    mpi.init_process_group("gloo")
    makers = {name: contender(model_of(name)) for name in ("stock", *RECIPES, "gather")}
    makers["gather, no network"] = contender(model_of("gather"), no_network)
    with kernels_only():
        makers["local_bn, C kernels"] = contender(model_of("local_bn"), kernels_only)
    counted = {name: beyond_stock(name) for name in RECIPES}
    result = {"ranks": dist.get_world_size(), "ms": rounds(makers, options), "frames": counted}
    finish(result, table([result]), options.json)


if __name__ == "__main__":
    main()
