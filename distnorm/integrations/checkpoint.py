"""Statistics that are kept over steps, in a folder that a framework's checkpoint has: one file per rank."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distnorm.attach import load_state_dict, state_dict
from distnorm.module import DistNorm
from distnorm.transport.rendezvous import group_timeout, tell_and_collect

logger = logging.getLogger("distnorm")


def is_converted(model: nn.Module) -> bool:
    """Whether ``model`` has layers that distnorm converted."""
    return any(isinstance(each, DistNorm) for each in model.modules())


def file_of(folder: str | Path, rank: int) -> Path:
    """The file that ``rank`` writes."""
    return Path(folder) / f"distnorm_state_{rank}.pt"


def save(models: Iterable[nn.Module], folder: str | Path) -> None:
    """Write this rank's statistics of the converted ones among ``models``; nothing if there are none.

    All ranks call it. No collective, unless a model has not been bound to its ranks yet.
    """
    states = [state_dict(model) for model in models if is_converted(model)]
    if states:
        rank, world_size = _place()
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save({"world_size": world_size, "models": states}, file_of(folder, rank))


def load(models: Iterable[nn.Module], folder: str | Path) -> None:
    """Go on from what ``save`` wrote: from this rank's file, or from rank 0's if the job had another size.

    All ranks call it, for they start cold together if one of them finds no file. They tell each other through the
    job's store what they found.

    Raises:
        ValueError: the files hold other models than these, or ranks found files of different steps.
    """
    converted = [model for model in models if is_converted(model)]
    state = _read(folder) if converted else {"models": []}
    if state is not None and len(state["models"]) != len(converted):
        raise ValueError(f"{folder}: distnorm state of {len(state['models'])} models; this job has {len(converted)}.")
    told = _tell(None if state is None else [[each["step"] for each in model] for model in state["models"]])
    found = {rank: steps for rank, steps in enumerate(told) if steps != []}  # pipeline stages may have no such layer
    if None in found.values() or state is None:
        without = [rank for rank, steps in found.items() if steps is None]
        logger.warning(
            "distnorm: ranks %s found no %s, nor rank 0's: statistics that are kept over steps start cold on all ranks",
            without,
            file_of(folder, without[0]),
        )
        return
    if len({json.dumps(steps) for steps in found.values()}) > 1:
        raise ValueError(f"{folder}: ranks have files of different steps, by rank {found}; restore one checkpoint.")
    for model, each in zip(converted, state["models"], strict=True):
        load_state_dict(model, each)


def _read(folder: str | Path) -> dict[str, Any] | None:
    rank, world_size = _place()
    for candidate in (rank, 0):
        path = file_of(folder, candidate)
        if path.is_file():
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            if candidate == 0 or state["world_size"] == world_size:
                if candidate != rank or state["world_size"] != world_size:
                    logger.warning(
                        "distnorm: rank %d of %d goes on from %s, of a job of %d ranks: windows start warm",
                        *(rank, world_size, path, state["world_size"]),
                    )
                return state
    return None


def _tell(steps: list[list[int]] | None) -> list[list[list[int]] | None]:
    """What every rank found, by rank."""
    if not dist.is_initialized():
        return [steps]
    world = dist.group.WORLD
    assert world is not None
    texts = tell_and_collect(tuple(range(dist.get_world_size())), json.dumps(steps), group_timeout(world))
    return [json.loads(text) for text in texts]


def _place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
