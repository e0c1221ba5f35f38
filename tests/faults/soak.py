"""``python -m tests.faults.soak --minutes 5`` (``make soak MINUTES=5``): jobs of 4 ranks, one after another.

Each round is a job of its own in the same processes: a random model, random shapes and empty batches, phases of
evaluation, saves, and restarts from what was saved. Recipes and transports take turns. Exact recipes are held to plain
autograd on the joined batch in float64; running statistics must be equal on all ranks, a restarted model go on with the
same bits, and what the processes hold not grow. Prints a report; exits with 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distnorm
from distnorm.integrations import checkpoint

RANKS = 4
STEPS = 8
TOLERANCE = 1e-9
GROWTH_MIB = 24.0
"""What the allocator may keep of shapes that it has not seen before, after the first half."""
LR = 0.01

EXACT = {"sync_bn": RANKS, "group_bn(size=2)": 2, 'lazy_bn(warmup=999, weights="none")': RANKS}
"""How many neighbours' batches are joined."""
RECIPES = (*EXACT, "mabn(window=2, warmup=2)", "lazy_bn(window=2, warmup=2)", "periodic_bn(every=3)")
TRANSPORTS = ("shm", "sockets", "gloo", "torch")
ONE_PER_GROUP = ("group_bn(size=2)",)
"""Running statistics are those of a group, until ``sync_running_stats``."""


def build(chance: random.Random) -> nn.Module:
    """Convolutions and norms."""
    widths = [3, *(chance.randint(1, 24) for _ in range(chance.randint(1, 4)))]
    torch.manual_seed(chance.randrange(2**31))
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.Tanh()]
    return nn.Sequential(*layers).double()


def batches(chance: random.Random) -> list[Tensor]:
    """One per rank, of one spatial shape; some of them empty, not all."""
    shape = chance.randint(2, 9), chance.randint(2, 9)
    counts = [chance.choice((0, 1, 2, 5)) for _ in range(RANKS)]
    counts[chance.randrange(RANKS)] = 3
    counts[chance.randrange(2) if counts[0] + counts[1] == 0 else 2 + chance.randrange(2)] += 1  # each group has some
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    return [
        torch.randn(count, 3, *shape, generator=generator, dtype=torch.float64) * (1 + rank) + rank
        for rank, count in enumerate(counts)
    ]


class Job:
    """One round: a model that trains, evaluates, is saved and restarted, and checks itself."""

    def __init__(self, number: int, folder: Path, recipe: str, transport: str) -> None:
        self.rank, self.folder, self.recipe, self.transport = dist.get_rank(), folder / str(number), recipe, transport
        self.chance = random.Random(number)
        self.stock = build(self.chance)
        self.model = self._converted()
        self.worst = 0.0
        self.counts: Counter[str] = Counter()

    def _converted(self) -> nn.Module:
        model = distnorm.convert(copy.deepcopy(self.stock), self.recipe, transport=self.transport)
        distnorm.attach(model)
        return model

    def run(self) -> None:
        for step in range(STEPS):
            joined = batches(self.chance)
            y = self._train(self.model, joined)
            if self.recipe in EXACT:
                self._compare(y, joined)
            self.counts["steps"] += 1
            self.counts["empty batches"] += joined[self.rank].shape[0] == 0
            if step % 3 == 1:
                self._evaluate(joined[self.rank])
            if step % 4 == 2:
                self._restart()
        self._check_agreement()

    def _train(self, model: nn.Module, joined: list[Tensor]) -> Tensor:
        model.train()
        y: Tensor = model(joined[self.rank])
        y.square().sum().backward()
        for each in model.parameters():
            each.grad = torch.zeros_like(each) if each.grad is None else each.grad
            dist.all_reduce(each.grad)
        _descend(model)
        return y.detach()

    def _compare(self, y: Tensor, joined: list[Tensor]) -> None:
        """With stock batch norm, each group's batches joined; gradients are summed over all, as are those of ranks."""
        size = EXACT[self.recipe]
        buffers = [buffer.clone() for buffer in self.stock.buffers()]
        own: list[Tensor] = []
        for first in range(0, RANKS, size):
            for buffer, before in zip(self.stock.buffers(), buffers, strict=True):
                buffer.data = before.clone()
            together = self.stock(torch.cat(joined[first : first + size]))
            together.square().sum().backward()
            if self.rank in range(first, first + size):
                expected = together.split([len(each) for each in joined[first : first + size]])[self.rank - first]
                self._close(y, expected, "outputs")
                own = [buffer.clone() for buffer in self.stock.buffers()]
        for buffer, after in zip(self.stock.buffers(), own, strict=True):
            buffer.data = after
        _descend(self.stock)
        for name, mine in self.model.state_dict().items():
            self._close(mine, self.stock.state_dict()[name], name)

    def _close(self, given: Tensor, expected: Tensor, what: str) -> None:
        if given.numel() == 0:
            return
        error = float(((given - expected).detach().abs() / (1 + expected.detach().abs())).max())
        self.worst = max(self.worst, error)
        self.counts["comparisons"] += 1
        if not error < TOLERANCE:
            raise AssertionError(f"{self}: {what} are {error:.1e} from those of stock batch norm")

    def _evaluate(self, x: Tensor) -> None:
        self.model.eval()
        before = [buffer.clone() for buffer in self.model.buffers()]
        with torch.no_grad():
            finite = bool(self.model(x).isfinite().all())
        same = all(map(torch.equal, before, self.model.buffers()))
        if not finite or not same:
            raise AssertionError(
                f"{self}: evaluation gave {'' if finite else 'no '}finite values, same buffers: {same}"
            )
        self.counts["evaluations"] += 1

    def _restart(self) -> None:
        """Save; let a new model go on from the files, beside the old one, and take its place."""
        checkpoint.save([self.model], self.folder)
        file = self.folder / f"model-{self.rank}.pt"
        torch.save(self.model.state_dict(), file)
        again = self._converted()
        again.load_state_dict(torch.load(file, weights_only=True))
        checkpoint.load([again], self.folder)
        joined = batches(self.chance)
        ys = [self._train(each, joined) for each in (self.model, again)]
        mine, other = ({"outputs": y, **each.state_dict()} for y, each in zip(ys, (self.model, again), strict=True))
        different = [name for name, value in mine.items() if not torch.equal(value, other[name])]
        if different:
            raise AssertionError(f"{self}: after a restart {different} have not the same bits")
        if self.recipe in EXACT:
            self._compare(ys[0], joined)
        self.model = again
        self.counts["restarts"] += 1

    def _check_agreement(self) -> None:
        if self.recipe in ONE_PER_GROUP:
            distnorm.sync_running_stats(self.model)
        everyone: list[Any] = [None] * RANKS
        dist.all_gather_object(everyone, [buffer.tolist() for buffer in self.model.buffers()])
        if any(each != everyone[0] for each in everyone):
            raise AssertionError(f"{self}: running statistics differ between ranks")

    def __str__(self) -> str:
        return f"{self.folder.name}: {self.recipe} over {self.transport}, rank {self.rank}"


def _descend(model: nn.Module) -> None:
    """By an optimizer, since those keep weights centred; its steps are short, whatever the gradients."""
    for each in model.parameters():
        assert each.grad is not None
        each.grad /= 1 + each.grad.norm()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer.step()
    optimizer.zero_grad()


def holds() -> dict[str, float]:
    """What this process holds, and no collection would free."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    segments = [path for path in Path("/proc/self/fd").iterdir() if "distnorm" in _target(path)]
    named = [path for path in Path("/dev/shm").iterdir() if path.name.startswith("distnorm")]
    return {
        "MiB": int(status["VmRSS"].split()[0]) / 1024,
        "threads": int(status["Threads"]),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "segments": len(segments) + len([path for path in named if str(os.getpid()) in path.name]),
    }


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # the descriptor of the listing itself
        return ""


def run_rank(rank: int, seconds: float, folder: Path) -> None:
    """Round after round; rank 0 says when it is over."""
    until = time.monotonic() + seconds
    worst, counts, held = 0.0, Counter[str](), []
    for number, (recipe, transport) in enumerate(turns()):
        store = f"file://{folder}/store-{number}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=120))
        job = Job(number, folder, recipe, transport)
        job.run()
        over: list[Any] = [time.monotonic() > until]
        dist.broadcast_object_list(over)
        dist.destroy_process_group()
        worst, counts = max(worst, job.worst), counts + job.counts
        del job
        held.append(holds())
        if over[0]:
            break
    print(json.dumps({"rounds": len(held), "worst": worst, "counts": counts, "held": held}), flush=True)


def turns() -> Iterator[tuple[str, str]]:
    """Recipes and transports: each recipe meets each transport."""
    pairs = [(recipe, transport) for transport in TRANSPORTS for recipe in RECIPES]
    random.Random(0).shuffle(pairs)
    return cycle(pairs)


def growth(held: list[dict[str, float]]) -> list[str]:
    """What is held at the end and was not in the first half; after few jobs nothing can be said."""
    if len(held) < 2 * len(RECIPES):
        return []
    middle, last = held[: len(held) // 2], held[-len(RECIPES) :]
    allowed = {"MiB": GROWTH_MIB, "threads": 0, "descriptors": 0, "segments": 0}
    grown = {what: max(each[what] for each in last) - max(each[what] for each in middle) for what in allowed}
    return [f"{what}: {more:g} more than in the first half" for what, more in grown.items() if more > allowed[what]]


def main() -> int:
    """Start the ranks, and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        run_rank(given.rank, 60 * given.minutes, given.folder)
        return 0
    with tempfile.TemporaryDirectory(prefix="distnorm-soak-") as folder:
        command = [sys.executable, "-m", "tests.faults.soak", "--minutes", str(given.minutes), "--folder", folder]
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], stdout=subprocess.PIPE, text=True)
            for rank in range(RANKS)
        ]
        told = [each.communicate()[0] for each in ranks]
    if any(each.returncode for each in ranks):
        print(f"WRONG: exit codes {[each.returncode for each in ranks]}")
        return 1
    return report([json.loads(text.splitlines()[-1]) for text in told])


def report(told: list[dict[str, Any]]) -> int:
    """Print what the ranks told."""
    total = sum((Counter(each["counts"]) for each in told), Counter[str]())
    print(f"{told[0]['rounds']} jobs of {RANKS} ranks; {', '.join(f'{n:,} {what}' for what, n in total.items())}")
    print(f"largest difference from stock batch norm in float64: {max(each['worst'] for each in told):.1e}")
    wrong = []
    for rank, each in enumerate(told):
        held = each["held"]
        spans = [
            f"{what} {held[0][what]:.0f}, {held[len(held) // 2][what]:.0f}, {held[-1][what]:.0f}" for what in held[0]
        ]
        print(f"rank {rank}: after the first, middle and last job: {'; '.join(spans)}")
        wrong += [f"rank {rank}: {grown}" for grown in growth(held)]
    print("\n".join(f"WRONG: {each}" for each in wrong) or "nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
