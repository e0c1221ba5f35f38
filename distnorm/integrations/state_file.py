"""The file of moving statistics beside a checkpoint that a script wrote: its name, what it holds, how it is found.

An entry has the state of a conversion, and the values that its layers had in the checkpoint. These tell which
checkpoint, and which model in it, the state belongs to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distnorm import messages
from distnorm.integrations import checkpoint
from distnorm.integrations.saved_values import place_of

SUFFIX = ".distnorm_state.pt"
_VERSION = 1


class Entry(NamedTuple):
    """The state of a conversion, with the values of its layers in the checkpoint."""

    values: dict[str, Tensor]
    state: dict[str, Any]


def beside(path: Path) -> Path:
    """Return the path of the file of state for a checkpoint at ``path``."""
    return path.with_name(f"{path.name}{SUFFIX}")


def path_of(f: object) -> Path | None:
    """Return the path of the file that ``torch.save`` or ``torch.load`` was given, if it is a file with a name."""
    name = f if isinstance(f, str | os.PathLike) else getattr(f, "name", None)
    return Path(os.fsdecode(name)) if isinstance(name, str | os.PathLike) and os.path.isfile(name) else None


def write(path: Path, entries: list[Entry]) -> None:
    """Write ``entries`` beside the checkpoint at ``path``, atomically, also if other ranks save to that path.

    Raises:
        OSError: the file cannot be written.
    """
    file = beside(path)
    temporary = file.with_name(f"{file.name}.{messages.rank_of(os.environ)}-{os.getpid()}.new")
    state = {"version": _VERSION, "entries": [each._asdict() for each in entries]}
    checkpoint.replace(file, state, temporary)


# docs/decisions.md#state-beside-a-scripts-checkpoint
def candidates(path: Path, tensors: Mapping[str, Tensor]) -> Iterator[Path]:
    """Yield the file of state of ``path``, then others in its folder: a script may rename or copy its checkpoints."""
    if beside(path).is_file():
        yield beside(path)
    if any(name.endswith("running_mean") for name in tensors):
        yield from (each for each in path.parent.glob(f"*{SUFFIX}") if each != beside(path))


def fitting(file: Path, tensors: Mapping[str, Tensor]) -> list[Entry]:
    """Return the entries of ``file`` whose values are among ``tensors``, which a checkpoint has.

    Ranks may replace the file meanwhile. torch.load opens it by its path, twice if mapped, so it is read again then.

    Raises:
        OSError: there is no such file.
        ValueError: it is not a file of state, or one of a newer version.
    """
    while True:
        before, found = _identity(file), None
        try:
            found = _among(tensors, file)
        except Exception:
            if _identity(file) == before:
                raise
        if found is not None and _identity(file) == before:
            return found


def _identity(file: Path) -> tuple[int, int]:
    found = file.stat()
    return found.st_ino, found.st_mtime_ns


def _among(tensors: Mapping[str, Tensor], file: Path) -> list[Entry]:
    # Mapped, since only few of its values are looked at if it is another checkpoint's.
    fits = [place_of(each.values, tensors) is not None for each in _read(file, mmap=True)]
    return [each for each, yes in zip(_read(file), fits, strict=True) if yes] if any(fits) else []


def _read(file: Path, *, mmap: bool = False) -> list[Entry]:
    match torch.load(file, map_location="cpu", weights_only=True, mmap=mmap):  # executes no code of the file
        case {"version": int(version), "entries": list(entries)} if version <= _VERSION:
            found = [entry for each in entries if (entry := _entry_of(each)) is not None]
            if len(found) == len(entries):
                return found
    raise ValueError(f"need a file that distnorm.run has written, of version {_VERSION} at most")


def _entry_of(given: object) -> Entry | None:
    match given:
        case {"values": dict(values), "state": {"step": int()} as state}:
            if all(isinstance(each, Tensor) for each in values.values()):
                return Entry(values, state)
    return None
