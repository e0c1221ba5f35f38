"""Where does gloo's all_reduce overtake the direct exchange? Measures the switch point of distnorm.transport.

Run ``torchrun --standalone --nproc_per_node P benchmarks/exchange.py``. Both contenders alternate on one group; rank 0
prints the median of each size and the paired ratio, as a Markdown table.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from datetime import date

import torch
import torch.distributed as dist
from torch import Tensor

from distnorm.transport import TorchGroup
from distnorm.types import Slot

SIZES = [2**power for power in range(4, 18)]
SLOT = Slot("benchmark", "forward", 0)


def timed(group: TorchGroup, wire: Tensor) -> float:
    """Milliseconds of one sum, from when all ranks are ready to go."""
    dist.barrier(group=group.process_group)
    started = time.perf_counter()
    group.sum(wire, SLOT)
    return (time.perf_counter() - started) * 1e3


def measure(exchange: TorchGroup, all_reduce: TorchGroup, size: int, runs: int) -> list[str]:
    """One row of the table: ``size`` float64 values."""
    wire = torch.ones(size, dtype=torch.float64)
    pairs = [(timed(exchange, wire), timed(all_reduce, wire)) for _ in range(runs + 3)][3:]
    direct, ring = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(one / other for one, other in pairs)
    return [str(size * 8), f"{direct:.3f}", f"{ring:.3f}", f"{ratio:.2f}"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=40, help="counted runs per size")
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = tuple(range(dist.get_world_size()))
    process_group = dist.new_group()
    exchange = TorchGroup(process_group, ranks, exchange_limit_bytes=2**40)
    all_reduce = TorchGroup(process_group, ranks, exchange_limit_bytes=0)
    rows = [measure(exchange, all_reduce, size, runs) for size in SIZES]
    if dist.get_rank() == 0:
        print(f"{len(ranks)} ranks on loopback, {platform.machine()}, torch {torch.__version__}, {date.today()}\n")
        print("| bytes | direct exchange, ms | all_reduce, ms | ratio |\n|---:|---:|---:|---:|")
        for row in rows:
            print(f"| {' | '.join(row)} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
