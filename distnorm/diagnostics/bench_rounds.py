"""Contenders that take turns for as long as a budget lasts, on every rank alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

KeyT = TypeVar("KeyT", bound=Hashable)

WARMUP = 2
"""Rounds that do not count: caches, threads and windows fill."""

LEAST = 5
"""Rounds that count at least, however slow they are."""


def take_turns(
    contenders: Mapping[KeyT, Callable[[], float]],
    seconds: float,
    device: torch.device,
    tell: Callable[[float], None],
) -> dict[KeyT, list[float]]:
    """What every contender returned in every counted round; each round starts with another one.

    Collective over all ranks, by one broadcast per round: rank 0's clock says when ``seconds`` are over. ``tell`` hears
    which part of them has passed.
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
        tell(min(1.0, (time.perf_counter() - started) / seconds))
    return {name: values[WARMUP:] for name, values in seen.items()}


def synchronize(device: torch.device) -> None:
    """Wait for what ``device`` was told to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _agree(go_on: bool, device: torch.device) -> bool:
    word = torch.tensor([int(go_on)], device=device)
    dist.broadcast(word, src=0)
    return bool(word.item())
