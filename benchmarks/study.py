"""Runs of a study: each finished one is a line of JSON in a file, and what has its line is not run again.

A cell names one run: a tuple of numbers and texts, whose fields come first in the line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

CellT = TypeVar("CellT", bound=NamedTuple)


def pending(cells: Sequence[CellT], path: Path) -> list[CellT]:
    """Those of ``cells`` without a line in ``path``; rank 0's view, as the file may grow while others still read."""
    kind = type(cells[0])
    found: list[list[CellT]] = [[]]
    if dist.get_rank() == 0:
        done = {cell for cell, _ in read_results(path, kind)}
        found = [[cell for cell in dict.fromkeys(cells) if cell not in done]]
        print(f"{len(found[0])} of {len(cells)} runs are to be done; results: {path}", file=sys.stderr)
    dist.broadcast_object_list(found)
    return [kind(*cell) for cell in found[0]]


def read_results(path: Path, kind: type[CellT]) -> Iterator[tuple[CellT, dict[str, Any]]]:
    """Runs and what they measured."""
    for line in path.read_text().splitlines() if path.exists() else ():
        entry = json.loads(line)
        yield kind(*(entry[name] for name in kind._fields)), entry


def run_all(cells: Iterable[CellT], path: Path, run: Callable[[CellT], Mapping[str, Any]]) -> None:
    """Run ``cells`` one after the other on all ranks; rank 0 adds a line with what ``run`` found after each."""
    for cell in tqdm(cells, disable=dist.get_rank() != 0, unit="run", mininterval=10.0, file=sys.stderr):
        found = run(cell)
        if dist.get_rank() == 0:
            entry = {**cell._asdict(), **found, "date": date.today().isoformat(), "torch": torch.__version__}
            with path.open("a") as file:
                file.write(json.dumps(entry, separators=(",", ":")) + "\n")
