"""Activation checkpointing: a recomputed forward gets the statistics of the first one, without a second collective.

Whether a forward is a recomputation is known from autograd's engine: it runs inside a backward pass. Which first
forward it repeats is known from its local sums, which it forms again from the same values; where a layer ran once, no
comparison is needed.
"""

from __future__ import annotations

from collections import deque
from weakref import WeakSet

import torch
from torch import Tensor

LOOSE_RECORDS = 64
"""How many first forwards without a graph to hold them are remembered per layer (reentrant checkpoints run those)."""


class Record:
    """One forward's local sums and the shared ones that answered them, in training step ``step``."""

    def __init__(self, local: Tensor, shared: Tensor, step: int, *, held: bool) -> None:
        """Remember detached values; ``held`` says that an autograd node keeps the record."""
        self.local = local.detach()
        self.shared = shared.detach()
        self.step = step
        self.held = held
        self.stands_for: list[Record] = []
        """Records that live as long as this one: it is one of them, and only the device knows which."""


class Records:
    """The forwards of one layer whose backward may still come.

    A record lives as long as the autograd node that it is given to. Those without a node (the first forward of a
    reentrant checkpoint runs under no_grad, and so does SWA's ``update_bn``) live until a forward of a later step, and
    at most ``LOOSE_RECORDS`` of them.
    """

    def __init__(self) -> None:
        """Empty."""
        self._held: WeakSet[Record] = WeakSet()
        self._loose: deque[Record] = deque(maxlen=LOOSE_RECORDS)

    def note(self, record: Record) -> None:
        """Remember ``record``: weakly if a graph holds it."""
        while self._loose and self._loose[0].step != record.step:
            self._loose.popleft()
        if record.held:
            self._held.add(record)
        else:
            self._loose.append(record)

    def recall(self, local: Tensor) -> Record | None:
        """The record whose local sums are nearest to ``local``, or None if there is none.

        Among several, a copy with the right sums: chosen on the device, so that nobody waits for a GPU. But where some
        are held and some are not, the host must know which one it is.
        """
        records = [*self._held, *self._loose]
        if len(records) <= 1:
            return records[0] if records else None
        nearest = (torch.stack([record.local for record in records]) - local).abs().sum(1).argmin(0, keepdim=True)
        if self._held and self._loose:
            return records[int(nearest)]
        shared = torch.stack([record.shared for record in records]).index_select(0, nearest).squeeze(0)
        found = Record(local, shared, records[0].step, held=records[0].held)
        found.stands_for = records
        return found
