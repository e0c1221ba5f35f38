"""Small sums that the ranks of a job do themselves, without a library's helper threads: turn by turn, in one order.

A message says whose vector it carries. Where ranks hand in those of different layers nothing is added: all of them see
it in the same turn, tell each other through the job's store, and raise the same error.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from datetime import timedelta
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from distnorm.transport.senders import Sender, mixed

logger = logging.getLogger("distnorm")

# docs/decisions.md#where-the-direct-exchange-ends
CAPACITY = 16 * 1024
"""Longest vector, in values: 128 KiB."""

# docs/decisions.md#a-waiting-rank-spins-first
AWAKE_S = 5e-3
"""How long a rank keeps looking for the others before it sleeps between looks.

A thread that sleeps is woken late, and on a core that another rank may be using: in a training step that cost about as
much again as the collective. One that yields lets others run, and goes on as soon as they are done.
"""


class Declined(NamedTuple):
    """Why the ranks of a group, all of them, do without a way; and how loud that is said where nobody insists on it."""

    cause: str
    level: int = logging.WARNING


# docs/decisions.md#small-all-reduces-do-not-use-gloo
class Direct(ABC):
    """Sums of float64 vectors on the CPU among the ranks of a group, which hand in the same number of values."""

    travels: ClassVar[bool] = True
    """Whether vectors cross a network, so that ranks do not come out of a sum at the same time."""

    def __init__(self, ranks: tuple[int, ...], place: int, timeout: timedelta) -> None:
        """As rank number ``place`` of ``ranks``; no turn yet."""
        self._ranks, self._place, self._timeout = ranks, place, timeout
        self._last: Turn | None = None

    @property
    def turn(self) -> int:
        """How many vectors this rank has handed in."""
        return 0 if self._last is None else self._last.number

    def takes(self, wire: Tensor) -> bool:
        """Whether ``wire`` can travel here: the same on every rank."""
        return wire.dtype is torch.float64 and wire.is_cpu and wire.numel() <= CAPACITY

    # docs/decisions.md#a-collective-can-be-interrupted
    def start(self, wire: Tensor, who: Sender) -> Turn:
        """Hand in ``wire`` of ``who``; one turn at a time. Where this raises, nothing was handed in, or all of it."""
        last = self._last
        if last is not None:
            last.settle()
        # From here on an exception, such as Ctrl-C, may come between any two lines. A turn is one assignment, which is
        # taken back if no part of the vector has left.
        turn = self._open(self.turn + 1, wire, who)
        self._last = turn
        try:
            self.post(turn)
        except BaseException:
            if not self.posted(turn):
                self._last = last
            raise
        turn.handed_in = True
        return turn

    def _open(self, number: int, wire: Tensor, who: Sender) -> Turn:
        return Turn(self, number, wire, who)

    @abstractmethod
    def post(self, turn: Turn) -> None:
        """Let the others have this rank's vector of the turn; what they have already is not sent again."""

    @abstractmethod
    def posted(self, turn: Turn) -> bool:
        """Whether others may have seen a part of this rank's vector of the turn."""

    @abstractmethod
    def finish(self, turn: Turn) -> bool:
        """Wait for the others', and write the sum, of equal bits on every rank; may be called again if it raised.

        Returns whether all sent what this rank did; if not there is no sum, but the turn is over.

        Raises:
            RuntimeError: a rank has ended, or did not take part within the timeout.
        """

    @abstractmethod
    def close(self) -> None:
        """Leave: whoever waits for this rank is told that it has ended."""

    def too_late(self, place: int) -> RuntimeError:
        """The error where rank number ``place`` did not come in time."""
        return RuntimeError(
            f"rank {self._ranks[place]} did not take part within {self._timeout.total_seconds():.0f} s."
        )

    def ended(self, place: int) -> RuntimeError:
        """The error where rank number ``place`` has gone."""
        return RuntimeError(f"rank {self._ranks[place]} has ended.")

    def mixed(self, turn: Turn) -> RuntimeError:
        """The error where ranks were not in the same layer. Collective."""
        return mixed(self._ranks, f"{turn.who.words}, {turn.wire.numel()} values", self._timeout)


class Turn:
    """One sum; done once it was waited for."""

    def __init__(self, direct: Direct, number: int, wire: Tensor, who: Sender) -> None:
        """Of vectors like ``wire``."""
        self.number, self.wire, self.who = number, wire.contiguous(), who
        self.sum = torch.empty_like(wire, memory_format=torch.contiguous_format)
        self.handed_in = False
        self._direct: Direct | None = direct
        self._error: RuntimeError | None = None

    def wait(self) -> None:
        """Return when all ranks have handed in."""
        self.settle()
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """``wait``, unless that was done before."""
        if self._direct is None:
            return
        direct = self._direct
        if not self.handed_in:
            direct.post(self)
        if not direct.finish(self):
            self._error = direct.mixed(self)
        self._direct = None  # not before: a sum that failed must fail again
        if self._error is not None:
            raise self._error

    def total(self) -> Tensor:
        """The sum."""
        return self.sum
