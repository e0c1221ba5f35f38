"""Statistics that are kept over steps, in a folder that a framework's checkpoint has: one file per rank."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from distnorm.attach import check_state_dict, load_state_dict, state_dict
from distnorm.layers.module import DistNorm
from distnorm.transport.rendezvous import group_timeout, tell_and_collect

logger = logging.getLogger("distnorm")


def is_converted(model: nn.Module) -> bool:
    """Whether ``model`` has layers that distnorm converted."""
    return any(isinstance(each, DistNorm) for each in model.modules())


def file_of(folder: str | Path, rank: int) -> Path:
    """The file that ``rank`` writes."""
    return Path(folder) / f"distnorm_state_{rank}.pt"


# docs/decisions.md#one-state-file-per-rank
def save(models: Iterable[nn.Module], folder: str | Path) -> None:
    """Write this rank's statistics of the converted ones among ``models``; nothing if there are none.

    All ranks call it. No collective, unless a model has not been bound to its ranks yet. Whoever reads the file sees
    all of the old one or all of the new one, whenever this process or its machine stops.

    Raises:
        OSError: the file cannot be written; the old one is still there.
    """
    states = [state_dict(model) for model in models if is_converted(model)]
    if states:
        rank, world_size = _place()
        Path(folder).mkdir(parents=True, exist_ok=True)
        _replace(file_of(folder, rank), {"world_size": world_size, "models": states})


def load(models: Iterable[nn.Module], folder: str | Path) -> None:
    """Go on from what ``save`` wrote: from this rank's file, or from rank 0's if the job had another size.

    All ranks call it, for they start cold together if one of them finds no file, and fail together if one of them
    cannot go on from its file. They tell each other through the job's store. Nothing that a file holds is executed.

    Raises:
        ValueError: on all ranks: a file that is damaged, or holds other models than these; the message names rank and
            file. Or ranks found files of different steps. No model has changed then.
    """
    converted = [model for model in models if is_converted(model)]
    states: list[Any] | None = None
    failure: Exception | None = None
    try:
        states = _read(converted, folder) if converted else []
    except Exception as error:  # whatever it is, the other ranks wait to hear of it
        failure = error
    told = _tell(states, failure)
    _raise_if_any(told, failure)
    if _all_found(told, folder) and states is not None:
        for model, each in zip(converted, states, strict=True):
            load_state_dict(model, each)


def _read(converted: list[nn.Module], folder: str | Path) -> list[Any] | None:
    """The state of each of the ``converted``, read and checked; None if there is none for this rank.

    Raises:
        ValueError: it cannot be read, or does not fit; the message names the file.
    """
    rank, world_size = _place()
    for candidate in dict.fromkeys((rank, 0)):
        path = file_of(folder, candidate)
        if not path.is_file():
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            written_by, models = _parts(state)
            if candidate != 0 and written_by != world_size:
                continue
            if len(models) != len(converted):
                raise ValueError(f"distnorm state of {len(models)} models; this job has {len(converted)}")
            for model, each in zip(converted, models, strict=True):
                check_state_dict(model, each)
        except Exception as error:
            raise ValueError(f"{path}: {_first_line(error)}") from error
        if candidate != rank or written_by != world_size:
            logger.warning(
                "distnorm: rank %d of %d goes on from %s, of a job of %d ranks: windows start warm",
                *(rank, world_size, path, written_by),
            )
        return models
    return None


def _parts(state: Any) -> tuple[int, list[Any]]:
    if not (isinstance(state, dict) and isinstance(state.get("models"), list) and type(state.get("world_size")) is int):
        raise ValueError("not a file that distnorm.integrations.checkpoint.save wrote")
    return state["world_size"], state["models"]


def _tell(states: list[Any] | None, failure: Exception | None) -> list[dict[str, Any]]:
    """What every rank found, by rank: the steps of its models' state, None if there is none; or why it failed."""
    steps = None if states is None else [[each["step"] for each in model] for model in states]
    mine = {"steps": steps, "failure": None if failure is None else _first_line(failure)}
    if not dist.is_initialized():
        return [mine]
    world = dist.group.WORLD
    assert world is not None
    texts = tell_and_collect(tuple(range(dist.get_world_size())), json.dumps(mine), group_timeout(world))
    return [json.loads(text) for text in texts]


def _raise_if_any(told: list[dict[str, Any]], failure: Exception | None) -> None:
    failed = [f"rank {rank}: {each['failure']}" for rank, each in enumerate(told) if each["failure"] is not None]
    if failed:
        raise ValueError(
            f"distnorm: {len(failed)} of {len(told)} ranks cannot go on from their file, so no rank has loaded any. "
            f"{'; '.join(failed[:4])}{'; ...' if failed[4:] else ''}. Restore a whole checkpoint, or take all files "
            "distnorm_state_*.pt out of the folder to start cold."
        ) from failure


def _all_found(told: list[dict[str, Any]], folder: str | Path) -> bool:
    """Whether no rank starts cold. Raises if ranks found different steps."""
    # Pipeline stages may have no such layer.
    found = {rank: each["steps"] for rank, each in enumerate(told) if each["steps"] != []}
    without = [rank for rank, steps in found.items() if steps is None]
    if without:
        logger.warning(
            "distnorm: ranks %s found no %s, nor rank 0's: statistics that are kept over steps start cold on all ranks",
            without,
            file_of(folder, without[0]),
        )
        return False
    if len({json.dumps(steps) for steps in found.values()}) > 1:
        raise ValueError(f"{folder}: ranks have files of different steps, by rank {found}; restore one checkpoint.")
    return True


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _replace(path: Path, state: dict[str, Any]) -> None:
    """Put a file of ``state`` in the place of ``path``, at once and for good."""
    beside = path.with_name(f"{path.name}.new")  # one name: what a killed process left is overwritten, not kept
    try:
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name, too, outlives a loss of power
    finally:
        os.close(folder)


def _place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
