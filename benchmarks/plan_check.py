"""Does the formula of ``distnorm plan`` foretell what collectives take? ResNet-18, ``sync_bn``.

Run ``torchrun --standalone --nproc_per_node 2 benchmarks/plan_check.py``, or with a delay between ranks ``python
benchmarks/hosts.py 2 1 python benchmarks/plan_check.py``.

Each run first measures sums alone, then predicts ``sync_bn``'s collective time per step in two ways: by the latency of
one size, and by the fit of all sizes that ``distnorm plan --measured`` uses. Then it takes training steps, and records
every collective on all ranks. ``of_all_ranks`` says what a collective's time is.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import finish, markdown
from models import IMAGE, resnet18

from distnorm import Recipe, recipes
from distnorm.attach import conversions_of
from distnorm.diagnostics.bench_links import measure_links, of_all_ranks
from distnorm.diagnostics.bench_rounds import take_turns
from distnorm.diagnostics.bench_steps import Trainer
from distnorm.diagnostics.plan import predict
from distnorm.diagnostics.plan_cost import Network, fit
from distnorm.transport import Topology
from distnorm.types import Slot

CPU = torch.device("cpu")
ONE_SIZE = 1024


class Stopwatch:
    """Notes how long each collective takes, in order. None starts before the one before it has been waited for."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def issued(self, slot: Slot, nbytes: int) -> None:
        """A collective starts."""
        self.seconds.append(0.0)

    def waited(self, slot: Slot, seconds: float) -> None:
        """Host time of it, which comes in parts: to start it, and to wait."""
        self.seconds[-1] += seconds


def check(width: int, batch: int, seconds: float) -> dict[str, Any]:
    """Measure and predict; milliseconds. Collective."""
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
    group = conversion.bound().reducer.group
    taken = of_all_ranks(torch.tensor(stopwatch.seconds, dtype=torch.float64), group).view(-1, 2 * len(layers))
    step = statistics.median(seen["local_bn"])
    one_size, by_fit = (
        predict("sync_bn", layers, len(ranks), len(ranks), network, "gloo", step).blocking_seconds
        for network in (alone, fit(points))
    )
    exposed = statistics.median(a - b for a, b in zip(seen["sync_bn"], seen["local_bn"], strict=True))
    measured = statistics.median(taken.sum(1).tolist())
    found = {"alpha": alpha, "one_size": one_size, "fit": by_fit, "measured": measured, "exposed": exposed}
    return {"ranks": len(ranks), "width": width, "batch": batch, "collectives": 2 * len(layers)} | {
        f"{name}_ms": value * 1e3 for name, value in found.items()
    }


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row per network."""
    names = ("alpha", "one_size", "fit", "measured")
    rows = []
    for result in results:
        cells = [f"{result.get('delay_ms') or 0:g}", str(result["collectives"])]
        cells += [f"{result[f'{name}_ms']:.3g}" for name in names]
        cells += [f"{result[f'{name}_ms'] / result['measured_ms']:.2f}" for name in ("one_size", "fit")]
        rows.append([*cells, f"{result['exposed_ms']:.3g}"])
    titles = ["delay, ms", "collectives", "α, ms", "by one size, ms", "by the fit, ms", "measured, ms"]
    return markdown([*titles, "one size / measured", "fit / measured", "exposed, ms"], rows, texts=0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Predicted against measured collective time of sync_bn.")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--batch", type=int, default=4, help="images per rank")
    parser.add_argument("--seconds", type=float, default=20.0, help="of measuring")
    parser.add_argument("--json", type=Path, help="where rank 0 writes the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = check(options.width, options.batch, options.seconds)
    finish(result, table([result]), options.json)


if __name__ == "__main__":
    main()
