"""Small all-reduces that ranks do themselves, without a library's helper threads: turn by turn, in one order.

A message says whose vector it carries. Where ranks hand in those of different layers nothing is added: all of them see
it in the same turn, tell each other through the job's store, and raise the same error.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from distnorm.transport.senders import Sender, mixed
from distnorm.types import Future

logger = logging.getLogger("distnorm")

# docs/decisions.md#where-the-direct-exchange-ends
CAPACITY = 16 * 1024
"""Longest vector, in values: 128 KiB."""

# docs/decisions.md#a-waiting-rank-spins-first
SPIN_S = 5e-3
"""How long a rank spin-waits for the others before it sleeps between looks, in seconds.

A thread that sleeps is woken late, and on a core that another rank may be using: in a training step that cost about as
much again as the collective. One that yields lets others run, and goes on as soon as they are done.
"""


class Declined(NamedTuple):
    """Why all ranks of a group do without a transport, and the level at which that is logged if none was asked for."""

    cause: str
    level: int = logging.WARNING

    @classmethod
    def by_rank(cls, ranks: tuple[int, ...], causes: Sequence[str]) -> Declined:
        """Of each rank that has one, the cause."""
        return cls("; ".join(f"rank {rank}: {why}" for rank, why in zip(ranks, causes, strict=True) if why))

    def log(self, message: str, ranks: tuple[int, ...]) -> None:
        """Log ``message``, with ``ranks`` and the cause in place of its two ``%s``."""
        logger.log(self.level, message, list(ranks), self.cause)


# docs/decisions.md#small-all-reduces-do-not-use-gloo
class Direct(ABC):
    """All-reduces of float64 vectors on the CPU among the ranks of a group, all of the same length."""

    over_network: ClassVar[bool] = True
    """Whether vectors cross a network, so that ranks do not come out of a sum at the same time."""

    def __init__(self, ranks: tuple[int, ...], place: int, timeout: timedelta) -> None:
        """As rank number ``place`` of ``ranks``; no turn yet."""
        self._ranks, self._place, self._timeout = ranks, place, timeout
        self._last: tuple[int, Future] | None = None

    @property
    def turn(self) -> int:
        """How many vectors this rank has handed in."""
        return 0 if self._last is None else self._last[0]

    def takes(self, wire: Tensor) -> bool:
        """Whether ``wire`` can travel here: the same on every rank."""
        return wire.dtype is torch.float64 and wire.is_cpu and wire.numel() <= CAPACITY

    # docs/decisions.md#a-collective-can-be-interrupted
    def start(self, wire: Tensor, who: Sender) -> Future:
        """Hand in ``wire`` of ``who``; one turn at a time. Where this raises, nothing was handed in, or all of it."""
        last = self._last
        if last is not None and not last[1].done():
            last[1].wait()
        # From here on an exception, such as Ctrl-C, may come between any two lines. A turn is one assignment, which is
        # taken back if no part of the vector has left.
        turn = self._open(self.turn + 1, wire, who)
        future = Future(partial(self._complete, turn))
        self._last = turn.number, future
        try:
            self.post(turn)
        except BaseException:
            if not self.posted(turn):
                self._last = last
            raise
        turn.handed_in = True
        return future

    def _open(self, number: int, wire: Tensor, who: Sender) -> Turn:
        return Turn(number, wire, who)

    def _complete(self, turn: Turn) -> Tensor | RuntimeError:
        if not turn.handed_in:
            self.post(turn)
        if self.finish(turn):
            return turn.sum
        return mixed(self._ranks, f"{turn.who.words}, {turn.wire.numel()} values", self._timeout)

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

    def timed_out(self, place: int) -> RuntimeError:
        """The error where rank number ``place`` did not come in time."""
        return RuntimeError(
            f"rank {self._ranks[place]} did not take part within {self._timeout.total_seconds():.0f} s."
        )

    def ended(self, place: int) -> RuntimeError:
        """The error where rank number ``place`` has gone."""
        return RuntimeError(f"rank {self._ranks[place]} has ended.")


class Turn:
    """What this rank hands in, and the sum to be."""

    def __init__(self, number: int, wire: Tensor, who: Sender) -> None:
        """The vector ``wire`` of ``who``."""
        self.number, self.wire, self.who = number, wire.contiguous(), who
        self.sum = torch.empty_like(wire, memory_format=torch.contiguous_format)
        self.handed_in = False
