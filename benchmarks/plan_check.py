"""Does the formula of ``distnorm plan`` foretell what collectives take? Two ranks, a ResNet-18, several delays.

Run ``python benchmarks/plan_check.py`` for two processes on loopback. With ``--netlab PROGRAM`` it runs once per delay
of ``--delays`` on a network between two hosts; ``PROGRAM up 2 MICROSECONDS`` makes it, ``PROGRAM run 2 COMMAND`` starts
one rank per host with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set, ``PROGRAM down 2`` removes it.

Each run first measures sums alone, then predicts ``sync_bn``'s collective time per step in two ways: by the latency of
one size, and by the fit of all sizes that ``distnorm plan --measured`` uses. Then it takes training steps, and records
every collective on both ranks. The rank that comes last waits for nobody, so a collective's time is the lesser one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from models import IMAGE, resnet18

from distnorm import Recipe, recipes
from distnorm.attach import conversions_of
from distnorm.diagnostics.bench_links import measure_links
from distnorm.diagnostics.bench_rounds import take_turns
from distnorm.diagnostics.bench_steps import Trainer
from distnorm.diagnostics.plan import predict
from distnorm.diagnostics.plan_cost import Network, fit
from distnorm.transport import Topology
from distnorm.types import Slot

CPU = torch.device("cpu")
ONE_SIZE = 1024
HEADER = ("delay (us)", "alpha (ms)", "collectives", "by one size (ms)", "by the fit (ms)", "measured (ms)")
RATIOS = ("one size / measured", "fit / measured", "exposed (ms)")


class Stopwatch:
    """Notes how long each collective takes, in order."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def issued(self, slot: Slot, nbytes: int) -> None:
        """Nothing to note yet."""

    def waited(self, slot: Slot, seconds: float) -> None:
        """A collective is done."""
        self.seconds.append(seconds)


def worker(width: int, batch: int, seconds: float, out: Path) -> None:
    """One rank: measure, predict, compare; rank 0 writes a row to ``out``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = tuple(range(dist.get_world_size()))
    links = measure_links(Topology(ranks), len(ranks), CPU, seconds / 2, lambda part: None)
    points = [point for link in links for point in link.points]
    alpha = next(each.seconds for each in points if each.algorithm == "exchange" and each.nbytes == ONE_SIZE)
    alone = Network(alpha=alpha, inverse_beta=0, alpha_node=alpha, inverse_beta_node=0)

    x = torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(dist.get_rank()))
    contenders: dict[str, Recipe] = {"sync_bn": recipes.sync_bn(), "local_bn": recipes.local_bn()}
    trainers = {name: Trainer(partial(resnet18, width), recipe, x, CPU) for name, recipe in contenders.items()}
    stopwatch = Stopwatch()
    (conversion,) = conversions_of(trainers["sync_bn"].model)
    conversion.observers.append(stopwatch)
    seen = take_turns({name: trainer.turn for name, trainer in trainers.items()}, seconds / 2, CPU, lambda part: None)

    layers = list(conversion.layers())
    least = torch.tensor(stopwatch.seconds, dtype=torch.float64).view(-1, 2 * len(layers))
    dist.all_reduce(least, dist.ReduceOp.MIN)
    measured = statistics.median(least.sum(1).tolist())
    step = statistics.median(seen["local_bn"])
    guesses = [
        predict("sync_bn", layers, len(ranks), len(ranks), network, "gloo", step).blocking_seconds
        for network in (alone, fit(points))
    ]
    exposed = statistics.median(a - b for a, b in zip(seen["sync_bn"], seen["local_bn"], strict=True))
    if dist.get_rank() == 0:
        row = [alpha * 1e3, 2 * len(layers), *(guess * 1e3 for guess in guesses), measured * 1e3]
        out.write_text(json.dumps([*row, *(guess / measured for guess in guesses), exposed * 1e3]))
    dist.barrier()
    dist.destroy_process_group()


def row_of(launch: list[str], options: argparse.Namespace) -> list[float]:
    """Run two ranks by ``launch`` and return what rank 0 found."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        numbers = [f"--{name}={getattr(options, name)}" for name in ("width", "batch", "seconds")]
        command = [*launch, __file__, f"--worker={out}", *numbers]
        subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=True)
        return [float(value) for value in json.loads(out.read_text())]


def main() -> None:
    """Launch, or be a rank."""
    parser = argparse.ArgumentParser(description="Predicted against measured collective time of sync_bn.")
    parser.add_argument("--netlab", type=Path, help="program that makes a network with latency; default: loopback only")
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 200, 1000], help="microseconds, one way")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--batch", type=int, default=4, help="images per rank")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring, per delay")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        worker(options.width, options.batch, options.seconds, options.worker)
        return
    titles = [*HEADER, *RATIOS]
    print(f"| {' | '.join(titles)} |\n|{'---:|' * len(titles)}")
    if options.netlab is None:
        row = row_of([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], options)
        print(f"| loopback | {' | '.join(f'{value:.3g}' for value in row)} |")
        return
    for delay in options.delays:
        subprocess.run([options.netlab, "up", "2", str(delay)], check=True)
        try:
            row = row_of([str(options.netlab), "run", "2", sys.executable], options)
        finally:
            subprocess.run([options.netlab, "down", "2"], check=True)
        print(f"| {delay} | {' | '.join(f'{value:.3g}' for value in row)} |", flush=True)


if __name__ == "__main__":
    main()
