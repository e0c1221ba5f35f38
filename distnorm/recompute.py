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
        """The record whose local sums are nearest to ``local``, or None if there is none."""
        records = [*self._held, *self._loose]
        if len(records) <= 1:
            return records[0] if records else None
        distances = torch.stack([(record.local - local).abs().sum() for record in records])
        return records[int(distances.argmin())]
