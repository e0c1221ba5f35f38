"""A layer of every method beside ``local_bn``: its time, what it keeps for the backward pass, and what it sends.

Run ``torchrun --standalone --nproc_per_node 2 benchmarks/methods.py``. Layers take turns on the same tensors; the time
contains the sums over the two ranks, through shared memory. *Kept* counts the storages that autograd saves beside the
input, parameters and buffers, in multiples of the input. Collectives and bytes are those of the ledger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from layer import REPEATS, pass_through
from measure import finish, markdown, milliseconds, parser_of, ratio, rounds
from torch import Tensor, nn

import distnorm
from distnorm.integrations import mpi

STOCK = "stock"
DEVIATIONS = "sd", "mad", "l1", "range", "worst_case", "sqd", "semideviation"
METHODS = (
    "local_bn",
    "sync_bn",
    "mabn",
    "lazy_bn",
    *(f"gbn(deviation={deviation!r})" for deviation in DEVIATIONS),
    "iebn",
    "mixture_norm",
    "mixture_norm(rounds=1)",
    "layer_norm",
    "group_norm",
    "instance_norm",
)
STEPS = 120  # until the warm-up of moving recipes is over


def layer_of(recipe: str, channels: int) -> nn.Module:
    """A layer of ``recipe``, or stock."""
    model = nn.Sequential(nn.BatchNorm2d(channels))
    return model[0] if recipe == STOCK else distnorm.convert(model, recipe)[0]


def contender(recipe: str, shape: Sequence[int]) -> Callable[[], float]:
    """A function that returns the milliseconds of the fastest pass of a round."""
    layer, x, dy = layer_of(recipe, shape[1]), torch.randn(*shape, requires_grad=True), torch.randn(*shape)
    for _ in range(STEPS):
        layer(x).backward(dy)
    return lambda: min(pass_through(layer, x, dy) for _ in range(REPEATS))


def kept_bytes(recipe: str, shape: Sequence[int]) -> int:
    """Bytes of the tensors that autograd keeps after a forward, beyond the input and the parameters."""
    layer, x = layer_of(recipe, shape[1]), torch.randn(*shape, requires_grad=True)
    known = {each.untyped_storage().data_ptr() for each in (x, *layer.parameters(), *layer.buffers())}
    sizes: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed):
        y = layer(x)
    own = y.untyped_storage().data_ptr()
    return sum(size for at, size in sizes.items() if at != own)


def collectives(recipe: str, channels: int) -> tuple[float, float]:
    """Collectives and bytes per step of a layer between the ranks, after any warm-up."""
    layer, x = nn.Sequential(layer_of(recipe, channels)), torch.randn(2, channels, 4, 4, requires_grad=True)
    for _ in range(STEPS):
        layer(x).square().mean().backward()
    with distnorm.Ledger(layer) as ledger:
        for _ in range(4):
            layer(x).square().mean().backward()
    return ledger.collectives / 4, ledger.bytes / 4


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row per method."""
    rows = []
    for result in results:
        base = result["ms"]["local_bn"]
        for name, times in result["ms"].items():
            number, size = result["sent"][name]
            kept = f"{result['kept'][name] / result['input_bytes']:.2f}"
            shown = name if name == STOCK else f"`{name}`"
            rows.append([shown, milliseconds(times), str(ratio(times, base)), kept, f"{number:g}", f"{size:.0f}"])
    titles = ["method", "forward and backward, ms", "over `local_bn`", "kept, in inputs"]
    return markdown([*titles, "collectives/step", "bytes/step"], rows)


def main() -> None:
    """Measure and print."""
    parser = parser_of("Time layers of every method.", runs=20)
    parser.add_argument("--shape", type=int, nargs=4, default=[8, 64, 28, 28])
    options = parser.parse_args()
    torch.set_num_threads(1)
    mpi.init_process_group("gloo")
    channels = options.shape[1]
    names = [STOCK, *METHODS]
    result = {
        "input_bytes": 4 * math.prod(options.shape),
        "kept": {name: kept_bytes(name, options.shape) for name in names},
        "sent": {name: collectives(name, channels) for name in names},
        "ms": rounds({name: contender(name, options.shape) for name in names}, options),
    }
    finish(result, table([result]), options.json)


if __name__ == "__main__":
    main()
