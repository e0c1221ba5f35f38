"""Run measurements in turns within a time budget, in the same order on all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

KeyT = TypeVar("KeyT", bound=Hashable)

WARMUP = 2
"""Rounds that are discarded, while caches, threads and windows fill."""

LEAST = 5
"""The smallest number of rounds, however slow they are."""


def take_turns(
    contenders: Mapping[KeyT, Callable[[], float]],
    seconds: float,
    device: torch.device,
    on_progress: Callable[[float], None],
) -> dict[KeyT, list[float]]:
    """Return what every contender returned in every round after the warm-up. Each round starts with another contender.

    Collective over all ranks: rank 0 broadcasts in each round whether ``seconds`` have passed by its clock.
    ``on_progress`` receives the part of them that has passed.
    """
    names = list(contenders)
    seen: dict[KeyT, list[float]] = {name: [] for name in names}
    started = time.perf_counter()
    turn = 0
    while _agree(turn < WARMUP + LEAST or time.perf_counter() - started < seconds, device):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seen[name].append(contenders[name]())
        turn += 1
        on_progress(min(1.0, (time.perf_counter() - started) / seconds))
    return {name: values[WARMUP:] for name, values in seen.items()}


def synchronize(device: torch.device) -> None:
    """Wait until all work queued on ``device`` has completed."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _agree(go_on: bool, device: torch.device) -> bool:
    word = torch.tensor([int(go_on)], device=device)
    dist.broadcast(word, src=0)
    return bool(word.item())
