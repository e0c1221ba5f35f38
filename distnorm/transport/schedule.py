"""Check before every collective that all ranks are about to issue the same one, with ``DISTNORM_CHECK=1``.

Our own messages name their sender. A collective of NCCL or MPI, and of gloo for large vectors, does not: it adds
whatever arrives, and some libraries abort the process if sizes differ.
"""

from __future__ import annotations

import os
from datetime import timedelta

from torch import Tensor

from distnorm.transport.rendezvous import all_gather_text
from distnorm.transport.senders import differing, sender
from distnorm.types import Slot

VARIABLE = "DISTNORM_CHECK"


class Schedule:
    """All-gather of the next collective's name, through the job's store: slow, for debugging."""

    def __init__(self, ranks: tuple[int, ...], purpose: str, timeout: timedelta) -> None:
        """Start without a collective; ``purpose`` distinguishes groups of the same ranks."""
        self._ranks, self._timeout = ranks, timeout
        self._doing = f"say which collective comes next ({purpose})"

    def check_sum(self, payload: Tensor, slot: Slot) -> None:
        """Check before a sum. Collective; raises as ``check``."""
        self.check(sender(slot.layer, slot.name, slot.direction, slot.model).words, payload)

    def check(self, what: str, tensor: Tensor) -> None:
        """Check before ``what`` is done with a tensor like this. Collective.

        Raises:
            RuntimeError: ranks are about to do different things, or some do nothing; on all ranks.
        """
        mine = f"{what}, {tensor.numel()} values of {tensor.dtype}"
        told = all_gather_text(self._ranks, mine, self._timeout, doing=self._doing)
        if len(set(told)) > 1:
            raise differing(self._ranks, told)


def schedule_of(ranks: tuple[int, ...], purpose: str, timeout: timedelta) -> Schedule | None:
    """Return a schedule for a group of ``ranks``, if the environment requests it.

    Raises:
        ValueError: the environment has another value.
    """
    choice = os.environ.get(VARIABLE, "0")
    if choice not in ("0", "1"):
        raise ValueError(f'environment {VARIABLE}={choice!r}: allowed are "0" (the default) and "1".')
    return Schedule(ranks, purpose, timeout) if choice == "1" else None
