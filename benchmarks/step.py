"""A whole training step: ResNet-18 for 32x32 images under DDP, one row per way to normalize.

Run ``torchrun --standalone --nproc_per_node 2 benchmarks/step.py``, or under ``launch/mpirun.sh 2``, where statistics
can travel by MPI as well, or on several hosts with ``benchmarks/hosts.py``. Steps of all contenders alternate in one
process. Exposed communication is a step less the ``local_bn`` step of the same round.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.distributed as dist
from measure import Times, difference, exposed_ratio, finish, markdown, milliseconds, parser_of, ratio, rounds
from models import IMAGE, resnet18
from peers import GatherNorm, NaiveNorm, replace_norms
from torch import nn
from training import stepper

import distnorm
from distnorm.attach import conversions_of
from distnorm.integrations import mpi
from distnorm.types import Transport

PEERS: dict[str, type[nn.Module]] = {"none": nn.Identity, "gather": GatherNorm, "naive": NaiveNorm}
DEFAULT = ("stock", "local_bn", "sync_bn", "gather", "naive", "none")
SHOWN = {"stock": "stock", "gather": "gather", "naive": "naive", "none": "no normalization"}


def build(contender: str, width: int) -> nn.Module:
    """The model of ``contender``: ``stock``, a peer, or a recipe.

    ``mpi:RECIPE`` and ``gloo:RECIPE`` share by that; in ``fused:RECIPE`` norms do what follows them.
    """
    model = resnet18(width)
    if contender in PEERS:
        return replace_norms(model, PEERS[contender])
    if contender == "stock":
        return model
    how, _, recipe = contender.rpartition(":")
    transport: Transport = "mpi" if how == "mpi" else "torch"
    return distnorm.convert(model, distnorm.recipes.parse(recipe), transport=transport, fuse=how == "fused")


def by_gloo(model: nn.Module, step: Callable[[], float]) -> Callable[[], float]:
    """``step`` of a ``model`` that has neither shared memory nor sockets for its statistics."""

    def stripped() -> float:
        groups = [conversion.bound().reducer.group for conversion in conversions_of(model)]
        kept = [group.direct for group in groups]  # groups serve all contenders
        for group in groups:
            group.direct = None
        try:
            return step()
        finally:
            for group, direct in zip(groups, kept, strict=True):
                group.direct = direct

    return stripped


def trainer(contender: str, options: argparse.Namespace) -> Callable[[], float]:
    """What takes one step of ``contender`` and returns its milliseconds."""
    model = build(contender, options.width)
    step = stepper(model, (options.batch, 3, IMAGE, IMAGE))
    return by_gloo(model, step) if contender.startswith("gloo:") else step


def table(seen: Times) -> list[str]:
    """One row per contender; a column for each peer that took part."""
    peers = [name for name in ("gather", "naive") if name in seen]
    base = seen.get("local_bn")
    rows = []
    for name, values in seen.items():
        cells = [SHOWN.get(name, f"`{name}`"), milliseconds(values)]
        cells.append(str(ratio(values, seen["stock"])) if "stock" in seen and name != "stock" else "")
        cells.append(milliseconds(difference(values, base)) if base and name != "local_bn" else "")
        for peer in peers:
            compared = base and name not in SHOWN and name != "local_bn"
            cells.append(str(exposed_ratio(values, seen[peer], base)) if compared and base else "")
        rows.append(cells)
    return markdown(["", "step, ms", "over stock", "exposed, ms", *(f"over {peer}'s" for peer in peers)], rows)


def main() -> None:
    """Measure and print."""
    parser = parser_of("Time training steps of a ResNet-18, side by side.", runs=40)
    parser.add_argument("--contenders", nargs="+", default=list(DEFAULT))
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16, help="images per rank")
    options = parser.parse_args()
    torch.set_num_threads(1)
    mpi.init_process_group("gloo")
    seen = rounds({name: trainer(name, options) for name in options.contenders}, options)
    result = {"ranks": dist.get_world_size(), "width": options.width, "batch": options.batch, "ms": seen}
    finish(result, table(seen), options.json)


if __name__ == "__main__":
    main()
