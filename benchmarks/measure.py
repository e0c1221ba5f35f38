"""Side by side: contenders take turns within a round, and figures are medians over rounds with a paired interval."""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from distnorm.diagnostics.bench_statistics import Interval, interval

LEAST = 6
"""Rounds that count at least, whatever the limit: fewer give no interval of 95 %."""

RESAMPLES = 1000

Times = Mapping[str, Sequence[float]]


def parser_of(text: str, runs: int, warmup: int = 3) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--runs", type=int, default=runs, help="counted rounds, at most")
    parser.add_argument("--warmup", type=int, default=warmup, help="rounds before them")
    parser.add_argument("--limit", type=float, default=math.inf, help=f"seconds, then no round beyond {LEAST} begins")
    parser.add_argument("--json", type=Path, help="where rank 0 writes every time that it measured")
    return parser


def rounds(contenders: Mapping[str, Callable[[], float]], options: argparse.Namespace) -> dict[str, list[float]]:
    """What every contender returned in every counted round; each round starts with another contender.

    Collective where there are several ranks: rank 0's clock decides whether one more round begins.
    """
    names = list(contenders)
    seen: dict[str, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    least = options.warmup + min(LEAST, options.runs)
    for turn in range(options.warmup + options.runs):
        if turn >= least and not _agreed(time.perf_counter() - started < options.limit):
            break
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seen[name].append(contenders[name]())
    return {name: values[options.warmup :] for name, values in seen.items()}


def _agreed(go_on: bool) -> bool:
    if not dist.is_initialized():
        return go_on
    word = torch.tensor([int(go_on)])
    dist.broadcast(word, src=0)
    return bool(word.item())


def ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    """The median of paired ratios."""
    return interval([one / other for one, other in zip(above, below, strict=True)])


def difference(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """What one takes longer than the other, round by round."""
    return [a - b for a, b in zip(one, other, strict=True)]


def exposed_ratio(ours: Sequence[float], theirs: Sequence[float], base: Sequence[float]) -> Interval:
    """Exposed communication of ours over theirs: medians of what a step takes longer than ``base``'s of its round.

    Single differences scatter around 0 where the machine is noisy, and their ratios have no median to speak of. So the
    ratio is that of the medians, and its 95 % interval comes from resampled rounds (bootstrap, with a fixed seed).
    """
    pairs = list(zip(difference(ours, base), difference(theirs, base), strict=True))
    draw = random.Random(0)
    found = sorted(_quotient(draw.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    tail = RESAMPLES // 40
    return Interval(_quotient(pairs), found[tail], found[-1 - tail])


def _quotient(pairs: Sequence[tuple[float, float]]) -> float:
    above, below = (statistics.median(column) for column in zip(*pairs, strict=True))
    return above / below if below > 0 else math.inf


def milliseconds(values: Sequence[float]) -> str:
    """Their median, as a table shows it."""
    middle = statistics.median(values)
    return f"{middle:.1f}" if abs(middle) >= 10 else f"{middle:.2f}"


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> list[str]:
    """A table; all columns but the first ``texts`` are numbers."""
    ruler = ["---" if column < texts else "---:" for column in range(len(titles))]
    return [f"| {' | '.join(cells)} |" for cells in (titles, ruler, *rows)]


def finish(result: Mapping[str, Any], lines: Sequence[str], path: Path | None) -> None:
    """Print the table, write ``result`` with four digits of each number, and end the job. Rank 0's figures count."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print("\n".join(lines))
        if path is not None:
            path.write_text(json.dumps(_rounded(result)))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
