"""What models are given: pictures, volumes, sound, words, series."""

from __future__ import annotations

import torch

from tests.models.case import Given, Inputs


def picture(side: int = 64, channels: int = 3, name: str = "0", dims: int = 2) -> Inputs:
    """A picture, or with 3 ``dims`` a volume, by position unless it has a name."""

    def draw(batch: int) -> Given:
        return {name: torch.rand(batch, channels, *[side] * dims)}

    return draw


def film(frames: int = 8, side: int = 64) -> Inputs:
    """Frames along the third dimension."""
    return lambda batch: {"0": torch.rand(batch, 3, frames, side, side)}


def values(*shape: int, name: str = "0") -> Inputs:
    """Values of a shape, as features of sound or a series."""
    return lambda batch: {name: torch.randn(batch, *shape)}


def words(length: int = 12, count: int = 30, name: str = "input_ids") -> Inputs:
    """Numbers of words."""
    return lambda batch: {name: torch.randint(2, count, (batch, length))}


def together(*parts: Inputs, **constants: object) -> Inputs:
    """Several of them, and what is always the same."""

    def draw(batch: int) -> Given:
        given = dict(constants)
        for part in parts:
            given |= part(batch)
        return given

    return draw


def boxes(side: int) -> Inputs:
    """Pictures and, in each, two boxes to find."""

    def draw(batch: int) -> Given:
        found = torch.tensor([[0.1, 0.1, 0.6, 0.5], [0.4, 0.3, 0.9, 0.8]]) * side
        target = {"boxes": found, "labels": torch.tensor([1, 2]), "masks": torch.ones(2, side, side).byte()}
        return {"0": list(torch.rand(batch, 3, side, side)), "1": [target] * batch}

    return draw
