"""Sums of small vectors by every way that distnorm.transport has, against gloo's all_reduce, by size.

Run ``torchrun --standalone --nproc_per_node P benchmarks/exchange.py``. Contenders alternate on one group; rank 0
prints the medians of each size and the paired ratios to all_reduce, as a Markdown table.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from measure import finish, markdown, parser_of, ratio, rounds
from torch import Tensor

from distnorm.transport import TorchGroup, shared_memory, sockets
from distnorm.types import Slot

SIZES = [2**power for power in range(4, 18)]
SLOT = Slot("benchmark", "forward", 0)
WAYS = {"memory": "shared memory", "sockets": "sockets", "exchange": "all_to_all"}
PATIENCE = timedelta(seconds=60)


def timed(group: TorchGroup, payload: Tensor) -> float:
    """Milliseconds of one sum, from when all ranks are ready to go."""
    dist.barrier(group=group.process_group)
    started = time.perf_counter()
    group.sum(payload, SLOT)
    return (time.perf_counter() - started) * 1e3


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row per size; for each number of ranks all_reduce's median, and each way's paired ratio to it."""
    titles = ["bytes"]
    for result in results:
        titles += [f"P = {result['ranks']}: all_reduce, ms", *WAYS.values()]
    rows = []
    for size in results[0]["sizes"]:
        row = [size]
        for result in results:
            seen = result["sizes"][size]
            row.append(f"{statistics.median(seen['all_reduce']):.3f}")
            row += [str(ratio(seen[way], seen["all_reduce"])) if way in seen else "" for way in WAYS]
        rows.append(row)
    return markdown(titles, rows, texts=0)


def main() -> None:
    """Measure and print."""
    options = parser_of("Time small sums by every way there is.", runs=40).parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = tuple(range(dist.get_world_size()))
    place = ranks, dist.get_rank(), PATIENCE
    process_group = dist.new_group()
    groups = {
        "all_reduce": TorchGroup(process_group, ranks, exchange_limit_bytes=0),
        "exchange": TorchGroup(process_group, ranks, exchange_limit_bytes=2**40),
        "memory": TorchGroup(process_group, ranks, direct=shared_memory.join(*place)),
        "sockets": TorchGroup(process_group, ranks, direct=sockets.join(*place)),
    }
    sizes = {}
    for size in SIZES:
        payload = torch.ones(size, dtype=torch.float64)
        usable = {name: each for name, each in groups.items() if each.direct is None or each.direct.takes(payload)}
        contenders: dict[str, Callable[[], float]] = {n: partial(timed, each, payload) for n, each in usable.items()}
        sizes[str(size * 8)] = rounds(contenders, options)
    result = {"ranks": len(ranks), "sizes": sizes}
    finish(result, table([result]), options.json)


if __name__ == "__main__":
    main()
