"""Small sums that the ranks of a job do themselves, without a library's helper threads: turn by turn, in one order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

CAPACITY = 16 * 1024
"""Longest vector, in values: 128 KiB."""

AWAKE_S = 5e-3
"""How long a rank keeps looking for the others before it sleeps between looks.

A thread that sleeps is woken late, and on a core that another rank may be using: in a training step that cost about as
much again as the collective. One that yields lets others run, and goes on as soon as they are done.
"""

LOOK_S = 0.1
"""How long it sleeps before it makes sure that those it waits for still live."""


class Direct(ABC):
    """Sums of float64 vectors on the CPU among the ranks of a group, which hand in the same number of values."""

    travels: ClassVar[bool] = True
    """Whether vectors cross a network, so that ranks do not come out of a sum at the same time."""

    def __init__(self) -> None:
        """No turn yet."""
        self.turn = 0
        self._under_way: Turn | None = None

    def takes(self, wire: Tensor) -> bool:
        """Whether ``wire`` can travel here: the same on every rank."""
        return wire.dtype is torch.float64 and wire.is_cpu and wire.numel() <= CAPACITY

    def start(self, wire: Tensor) -> Turn:
        """Hand in ``wire``, which is copied; one turn at a time."""
        if self._under_way is not None:
            self._under_way.wait()
        self.turn += 1
        self.post(wire.contiguous())
        self._under_way = Turn(self, wire)
        return self._under_way

    @abstractmethod
    def post(self, wire: Tensor) -> None:
        """Let the others have this rank's vector of the turn."""

    @abstractmethod
    def finish(self, total: Tensor) -> None:
        """Wait for the others', and write the sum, of equal bits on every rank.

        Raises:
            RuntimeError: a rank has ended, did not take part within the timeout, or sent a vector of another length.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave: whoever waits for this rank is told that it has ended."""


class Turn:
    """One sum; done once it was waited for."""

    def __init__(self, direct: Direct, wire: Tensor) -> None:
        """Of vectors like ``wire``."""
        self._direct: Direct | None = direct
        self._total = torch.empty_like(wire, memory_format=torch.contiguous_format)

    def wait(self) -> None:
        """Return when all ranks have handed in."""
        if self._direct is not None:
            self._direct.finish(self._total)
            self._direct = None  # not before: a sum that failed must fail again

    def total(self) -> Tensor:
        """The sum."""
        return self._total
