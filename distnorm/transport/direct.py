"""Small all-reduces without a library's helper threads: the ranks do them one turn at a time, in the same order.

A message names the layer of its vector. If ranks send vectors of different layers, nothing is added. All ranks detect
this in the same turn, exchange texts through the job's store, and raise the same error.
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
"""Largest vector, in float64 values: 128 KiB."""

# docs/decisions.md#a-waiting-rank-spins-first
SPIN_S = 5e-3
"""How long a rank spin-waits for the others, in seconds, before it sleeps between checks.

A thread that sleeps is woken late, and on a core that another rank may be using: in a training step this took about as
much time again as the collective. A thread that yields lets others run, and continues as soon as they are done.
"""


class Declined(NamedTuple):
    """Why no rank of a group uses a transport, and the log level of this if the user requested none."""

    cause: str
    level: int = logging.WARNING

    @classmethod
    def by_rank(cls, ranks: tuple[int, ...], causes: Sequence[str]) -> Declined:
        """Combine the causes of all ranks that have one."""
        return cls("; ".join(f"rank {rank}: {why}" for rank, why in zip(ranks, causes, strict=True) if why))

    def log(self, message: str, ranks: tuple[int, ...]) -> None:
        """Log ``message``, with ``ranks`` and the cause in place of its two ``%s``."""
        logger.log(self.level, message, list(ranks), self.cause)


# docs/decisions.md#small-all-reduces-do-not-use-gloo
class Direct(ABC):
    """All-reduces of float64 vectors of equal length on the CPU, among the ranks of a group."""

    over_network: ClassVar[bool] = True
    """Whether vectors are sent over a network, so that ranks do not finish a sum at the same time."""

    def __init__(self, ranks: tuple[int, ...], place: int, timeout: timedelta) -> None:
        """Start as rank number ``place`` of ``ranks``, before the first turn."""
        self._ranks, self._place, self._timeout = ranks, place, timeout
        self._last: tuple[int, Future] | None = None

    @property
    def turn(self) -> int:
        """Return the number of vectors that this rank has sent."""
        return 0 if self._last is None else self._last[0]

    def takes(self, payload: Tensor) -> bool:
        """Return whether this transport accepts ``payload``; the answer is the same on every rank."""
        return payload.dtype is torch.float64 and payload.is_cpu and payload.numel() <= CAPACITY

    # docs/decisions.md#a-collective-can-be-interrupted
    def start(self, payload: Tensor, who: Sender) -> Future:
        """Send the vector ``payload`` of ``who``; one turn at a time. If this raises, all was sent, or nothing."""
        last = self._last
        if last is not None and not last[1].done():
            last[1].wait()
        # From here on an exception, such as Ctrl-C, may come between any two lines. A turn is one assignment, which is
        # undone if no part of the vector has been sent.
        turn = self._open(self.turn + 1, payload, who)
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

    def _open(self, number: int, payload: Tensor, who: Sender) -> Turn:
        return Turn(number, payload, who)

    def _complete(self, turn: Turn) -> Tensor | RuntimeError:
        if not turn.handed_in:
            self.post(turn)
        if self.finish(turn):
            return turn.sum
        return mixed(self._ranks, f"{turn.who.words}, {turn.payload.numel()} values", self._timeout)

    @abstractmethod
    def post(self, turn: Turn) -> None:
        """Send this rank's vector of the turn to the other ranks. A part that was sent already is not sent again."""

    @abstractmethod
    def posted(self, turn: Turn) -> bool:
        """Return whether other ranks may have seen a part of this rank's vector of the turn."""

    @abstractmethod
    def finish(self, turn: Turn) -> bool:
        """Wait for the vectors of the other ranks, and write the sum. May be called again if it raised.

        The sum is bitwise equal on all ranks. Return whether all ranks sent vectors of the same layer and size. If not,
        there is no sum, but the turn is over.

        Raises:
            RuntimeError: a rank has ended, or did not take part within the timeout.
        """

    @abstractmethod
    def gone(self) -> int | None:
        """Return the place of a rank that has ended; None if none has, as far as can be seen."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group. Ranks that wait for this one learn that it has ended."""

    def timed_out(self, place: int) -> RuntimeError:
        """Return the error that rank number ``place`` did not take part within the timeout."""
        return RuntimeError(
            f"rank {self._ranks[place]} did not take part within {self._timeout.total_seconds():.0f} s."
        )

    def ended(self, place: int) -> RuntimeError:
        """Return the error that rank number ``place`` has ended."""
        return RuntimeError(f"rank {self._ranks[place]} has ended.")


class Turn:
    """The vector of this rank in one turn, and the sum."""

    def __init__(self, number: int, payload: Tensor, who: Sender) -> None:
        """Start turn ``number`` with the vector ``payload`` of ``who``."""
        self.number, self.payload, self.who = number, payload.contiguous(), who
        self.sum = torch.empty_like(payload, memory_format=torch.contiguous_format)
        self.handed_in = False
