"""Activation checkpointing: a recomputed forward gets the statistics of the first one, without a second collective.

The call stack shows whether a forward is a recomputation (``engine.repeating``). Its local sums identify the first
forward that it repeats: they are computed again from the same values, and equal up to rounding. On a CPU they decide:
if no record has equal sums, the forward is a new one. This is not checked on a GPU, since the host would wait.
"""

from __future__ import annotations

import itertools
from collections import deque
from weakref import WeakSet

import torch
from torch import Tensor

LOOSE_RECORDS = 64
"""The largest number of first forwards per layer that no graph holds (reentrant checkpoints run those)."""

_numbers = itertools.count()

TOLERANCE = 1e-2
"""The largest relative difference of a repetition's sums, due to lossy storage of activations."""


class Record:
    """The local sums of one forward and the shared sums that it got, in training step ``step``."""

    def __init__(self, local: Tensor, shared: Tensor, step: int, *, in_graph: bool) -> None:
        """Keep the values without their graph; ``in_graph``: an autograd node holds the record."""
        self.local = local.detach() if local.requires_grad else local
        self.shared = shared.detach() if shared.requires_grad else shared
        self.step = step
        self.in_graph = in_graph
        self.repeated = False
        """Whether a recomputation has used it."""
        self.number = next(_numbers)
        self.stands_for: list[Record] = []
        """Records that live as long as this one: it is a copy of one of them, and only the device knows of which."""

    def is_near(self, local: Tensor, kinds: int) -> bool:
        """Return whether ``local`` sums, of ``kinds`` rows and a count, belong to the same values.

        The last row contains sums of squares or of other values of one sign. With the count it gives the scale of all
        rows.
        """
        count = float(local[-1])
        if count != float(self.local[-1]):
            return False
        if not count:
            return True
        apart_K = _apart(local, self.local)[:-1].view(kinds, -1).sum(1)
        squares_C = self.local[:-1].view(kinds, -1)[-1].abs()
        scale_K = torch.stack([(count * squares_C).sqrt().sum()] * (kinds - 1) + [squares_C.sum()])
        return not bool((apart_K > TOLERANCE * scale_K).any())


class Records:
    """The forwards of one layer whose backward may still follow.

    A record lives as long as the autograd node that holds it. Records without a node live until a forward of a later
    step, and at most ``LOOSE_RECORDS`` of them are kept. They belong to forwards under no_grad: the first forward of a
    reentrant checkpoint, or SWA's ``update_bn``.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._in_graph: WeakSet[Record] = WeakSet()
        self._loose: deque[Record] = deque(maxlen=LOOSE_RECORDS)

    def note(self, record: Record) -> None:
        """Remember ``record``, weakly if a graph holds it."""
        while self._loose and self._loose[0].step != record.step:
            self._loose.popleft()
        if record.in_graph:
            self._in_graph.add(record)
        else:
            self._loose.append(record)

    # docs/decisions.md#which-forward-pass-a-recomputation-repeats
    def recall(self, local: Tensor, kinds: int = 1) -> Record | None:
        """Return the record whose local sums are nearest to ``local``, of ``kinds`` rows; None if they differ.

        Of equal ones it is the oldest that no recomputation has used. If there are several on a GPU, return a copy with
        the right sums, chosen on the device, so that the host does not wait. If a graph holds only some of them, the
        host has to know which one it is, and waits.
        """
        records = sorted((*self._in_graph, *self._loose), key=lambda record: (record.repeated, record.number))
        if not records:
            return None
        if local.device.type == "cpu":
            found = _nearest(records, local)
            return found if found.is_near(local, kinds) else None
        if len(records) == 1 or (self._in_graph and self._loose):
            return _nearest(records, local)
        nearest = _distances(records, local).argmin(0, keepdim=True)
        shared = torch.stack([record.shared for record in records]).index_select(0, nearest).squeeze(0)
        chosen = Record(local, shared, records[0].step, in_graph=records[0].in_graph)
        chosen.stands_for = records
        return chosen


def _nearest(records: list[Record], local: Tensor) -> Record:
    return records[0] if len(records) == 1 else records[int(_distances(records, local).argmin())]


def _distances(records: list[Record], local: Tensor) -> Tensor:
    return _apart(torch.stack([record.local for record in records]), local).sum(1)


def _apart(one: Tensor, two: Tensor) -> Tensor:
    """Return ``abs(one - two)``, where NaN is equal to NaN alone, and infinity to itself."""
    equal = (one == two) | (one.isnan() & two.isnan())
    return torch.where(equal, 0, (one - two).abs().nan_to_num(torch.inf, torch.inf))
