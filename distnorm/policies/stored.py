"""What a saved state must contain for a reducer to resume from it: checked as a whole, before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from distnorm.types import Layout

Check = Callable[[str, object], None]
"""Check the part of a state at a place. Raise a ValueError that names the place if the part does not fit."""


def anything(where: str, given: object) -> None:
    """Accept every state."""


def whole(where: str, given: object) -> None:
    """Require an integer that is at least 0."""
    if type(given) is not int or given < 0:
        raise ValueError(f"{where} is {_short(given)}; need a whole number, at least 0")


def array(*shape: int | None, dtype: torch.dtype = torch.float64) -> Check:
    """Return the check of a tensor of this shape, where None stands for any size."""

    def check(where: str, given: object) -> None:
        if not isinstance(given, Tensor) or given.is_meta or given.layout != torch.strided:
            raise ValueError(f"{where} is {_short(given)}; need a tensor with values")
        fits = given.dim() == len(shape) and all(
            size in (None, found) for size, found in zip(shape, given.shape, strict=True)
        )
        if not fits or given.dtype != dtype:
            sizes = ["any" if size is None else size for size in shape]
            raise ValueError(f"{where} is {_short(given)}; need one of shape {sizes} in {dtype}")

    return check


def fields(required: Mapping[str, Check], **optional: Check) -> Check:
    """Return the check of a dict that has all ``required``, may have ``optional``, and has no other tensors."""
    known = {**optional, **required}

    def check(where: str, given: object) -> None:
        if not isinstance(given, dict):
            raise ValueError(f"{where} is {_short(given)}; need a dict with {sorted(required)}")
        missing = [name for name in required if name not in given]
        foreign = [str(name) for name, each in given.items() if name not in known and _holds_tensors(each)]
        if missing or foreign:
            raise ValueError(f"{where} lacks {missing} and has {foreign}; known are {sorted(known)}")
        for name in known.keys() & given.keys():
            known[name](f"{where}/{name}", given[name])

    return check


def entries(slots: int, values: int) -> Check:
    """Return the check of the state of ``Entries`` of any depth."""
    numbers = array(slots, dtype=torch.int64)
    stored = fields({"ring": array(None, values), "filled": numbers, "position": numbers})

    def check(where: str, given: object) -> None:
        stored(where, given)
        assert isinstance(given, dict), "checked just now"
        depth = len(given["ring"])
        for name, most in (("filled", depth), ("position", max(depth - 1, 0))):
            if given[name].numel() and not 0 <= int(given[name].min()) <= int(given[name].max()) <= most:
                raise ValueError(f"{where}/{name} is {given[name].tolist()}; need numbers from 0 to {most}")

    return check


def bucket(slots: int, values: int) -> Check:
    """Return the check of the state of a ``Bucket``."""
    vector = array(values + slots + 1)
    return fields({"outbox": vector, "dropped": array(slots, dtype=torch.int64)}, in_flight=vector)


def sizes_of(layout: Layout, extra: int = 0) -> list[int]:
    """Return the number of values of each slot of a bucket."""
    return [size + extra * (direction == "forward") for (_, direction, _), size in layout.sizes.items()]


def _holds_tensors(given: object) -> bool:
    if isinstance(given, dict):
        return any(map(_holds_tensors, given.values()))
    return any(map(_holds_tensors, given)) if isinstance(given, list | tuple) else isinstance(given, Tensor)


def _short(given: object) -> str:
    if isinstance(given, Tensor):
        return f"a tensor of shape {list(given.shape)} in {given.dtype} on {given.device}"
    return repr(given) if isinstance(given, bool | int | float | None) else f"a {type(given).__name__}"
