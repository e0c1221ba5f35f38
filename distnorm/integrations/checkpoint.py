"""Save and load statistics that are kept over steps, in the folder of a framework's checkpoint: one file per rank."""

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
from distnorm.transport.rendezvous import all_gather_text, group_timeout

logger = logging.getLogger("distnorm")


def is_converted(model: nn.Module) -> bool:
    """Return whether ``model`` has converted layers."""
    return any(isinstance(each, DistNorm) for each in model.modules())


def file_of(folder: str | Path, rank: int) -> Path:
    """Return the path of the file that ``rank`` writes."""
    return Path(folder) / f"distnorm_state_{rank}.pt"


# docs/decisions.md#one-state-file-per-rank
def save(models: Iterable[nn.Module], folder: str | Path) -> None:
    """Write this rank's statistics of the converted models among ``models``, if there are any.

    All ranks call it. Issues no collective, unless a model is not bound to its ranks yet. The file is replaced
    atomically: even if this process or its machine stops, a reader sees all of the old file or all of the new one.

    Raises:
        OSError: the file cannot be written; the old one is unchanged.
    """
    states = [state_dict(model) for model in models if is_converted(model)]
    if states:
        rank, world_size = _place()
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = file_of(folder, rank)
        # A fixed name, so that a killed process leaves at most one file.
        replace(path, {"world_size": world_size, "models": states}, path.with_name(f"{path.name}.new"))


def load(models: Iterable[nn.Module], folder: str | Path) -> None:
    """Resume from the files that ``save`` wrote: from this rank's file, or rank 0's if the job had another world size.

    All ranks call it, and exchange the outcome through the job's store. If one of them finds no file, all start cold.
    If one of them cannot load its file, all raise. Loading executes no code from a file.

    Raises:
        ValueError: on all ranks, if a file is damaged or holds other models; the message names rank and file. Or if
            ranks found files of different steps. No model is changed.
    """
    converted = [model for model in models if is_converted(model)]
    states: list[Any] | None = None
    failure: Exception | None = None
    try:
        states = _read(converted, folder) if converted else []
    except Exception as error:  # of any type, since the other ranks wait for this rank's outcome
        failure = error
    outcomes = _exchange(states, failure)
    _raise_if_any(outcomes, failure)
    if _all_found(outcomes, folder) and states is not None:
        for model, each in zip(converted, states, strict=True):
            load_state_dict(model, each)


def _read(converted: list[nn.Module], folder: str | Path) -> list[Any] | None:
    """Return the checked state of each of the ``converted`` models; None if there is no file for this rank.

    Raises:
        ValueError: the file cannot be read, or does not fit the models; the message names it.
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
                raise ValueError(f"has the state of {len(models)} models; this job has {len(converted)}")
            for model, each in zip(converted, models, strict=True):
                check_state_dict(model, each)
        except Exception as error:
            raise ValueError(f"{path}: {first_line(error)}") from error
        if candidate != rank or written_by != world_size:
            logger.warning(
                "distnorm: rank %d of %d resumes from %s, of a job of %d ranks: windows start warm",
                *(rank, world_size, path, written_by),
            )
        return models
    return None


def _parts(state: Any) -> tuple[int, list[Any]]:
    if not (isinstance(state, dict) and isinstance(state.get("models"), list) and type(state.get("world_size")) is int):
        raise ValueError("not a file that distnorm.integrations.checkpoint.save wrote")
    return state["world_size"], state["models"]


def _exchange(states: list[Any] | None, failure: Exception | None) -> list[dict[str, Any]]:
    """Return the outcome of every rank: the steps of its models' states (None if it has no file), or its failure."""
    steps = None if states is None else [[each["step"] for each in model] for model in states]
    mine = {"steps": steps, "failure": None if failure is None else first_line(failure)}
    if not dist.is_initialized():
        return [mine]
    world = dist.group.WORLD
    assert world is not None
    texts = all_gather_text(tuple(range(dist.get_world_size())), json.dumps(mine), group_timeout(world))
    return [json.loads(text) for text in texts]


def _raise_if_any(outcomes: list[dict[str, Any]], failure: Exception | None) -> None:
    failed = [f"rank {rank}: {each['failure']}" for rank, each in enumerate(outcomes) if each["failure"] is not None]
    if failed:
        raise ValueError(
            f"distnorm: {len(failed)} of {len(outcomes)} ranks cannot resume from their file, so no rank has loaded "
            f"any. {'; '.join(failed[:4])}{'; ...' if failed[4:] else ''}. Restore a whole checkpoint, or remove all "
            "files distnorm_state_*.pt from the folder to start cold."
        ) from failure


def _all_found(outcomes: list[dict[str, Any]], folder: str | Path) -> bool:
    """Return whether every rank that has converted layers found a state; raise if their steps differ."""
    # Pipeline stages may have no such layer.
    found = {rank: each["steps"] for rank, each in enumerate(outcomes) if each["steps"] != []}
    without = [rank for rank, steps in found.items() if steps is None]
    if without:
        logger.warning(
            "distnorm: ranks %s found neither %s nor rank 0's file: moving statistics start cold on all ranks",
            without,
            file_of(folder, without[0]),
        )
        return False
    if len({json.dumps(steps) for steps in found.values()}) > 1:
        raise ValueError(f"{folder}: ranks have files of different steps, by rank {found}; restore one checkpoint.")
    return True


def first_line(error: Exception) -> str:
    """Return the first line of the message of ``error``, or its type if there is none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def replace(path: Path, state: dict[str, Any], temporary: Path) -> None:
    """Replace the file ``path`` by one that holds ``state``, atomically and durably, through the file ``temporary``.

    Raises:
        OSError: the file cannot be written; the old one is unchanged.
    """
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the new directory entry durable
    finally:
        os.close(folder)


def _place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
