"""Activation checkpointing: a recomputed forward gets the statistics of the first one, without a second collective.

Whether a forward is a recomputation is known from the calls that led to it (``engine.repeating``). Which first
forward it repeats is known from its local sums, which it forms again from the same values, up to rounding. On a CPU
they are proof, too: where no record has them, the forward is a new one. A GPU is not asked, since the host would wait.
"""

from __future__ import annotations

from collections import deque
from weakref import WeakSet

import torch
from torch import Tensor

LOOSE_RECORDS = 64
"""How many first forwards without a graph to hold them are remembered per layer (reentrant checkpoints run those)."""

TOLERANCE = 1e-2
"""How far a repetition's sums may be from the first ones: lossy storage of activations rounds that much."""


class Record:
    """One forward's local sums and the shared ones that answered them, in training step ``step``."""

    def __init__(self, local: Tensor, shared: Tensor, step: int, *, held: bool) -> None:
        """Remember values without their graph; ``held`` says that an autograd node keeps the record."""
        self.local = local.detach() if local.requires_grad else local
        self.shared = shared.detach() if shared.requires_grad else shared
        self.step = step
        self.held = held
        self.repeated = False
        """Whether a recomputation has asked for it."""
        self.stands_for: list[Record] = []
        """Records that live as long as this one: it is one of them, and only the device knows which."""

    def is_near(self, local: Tensor, kinds: int) -> bool:
        """Whether ``local`` sums, of ``kinds`` rows and a count, are those of the same values.

        The last row sums squares, or what else has one sign: with the count it is the scale of all other rows.
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

    # docs/decisions.md#which-forward-pass-a-recomputation-repeats
    def recall(self, local: Tensor, kinds: int = 1) -> Record | None:
        """The record whose local sums, of so many ``kinds``, are nearest to ``local``; None if they are others.

        Among several on a GPU, a copy with the right sums: chosen on the device, so that nobody waits for it. But where
        some are held and some are not, the host must know which one it is.
        """
        records = [*self._held, *self._loose]
        if not records:
            return None
        if local.device.type == "cpu":
            found = _nearest(records, local)
            return found if found.is_near(local, kinds) else None
        if len(records) == 1 or (self._held and self._loose):
            return _nearest(records, local)
        nearest = _distances(records, local).argmin(0, keepdim=True)
        shared = torch.stack([record.shared for record in records]).index_select(0, nearest).squeeze(0)
        chosen = Record(local, shared, records[0].step, held=records[0].held)
        chosen.stands_for = records
        return chosen


def _nearest(records: list[Record], local: Tensor) -> Record:
    return records[0] if len(records) == 1 else records[int(_distances(records, local).argmin())]


def _distances(records: list[Record], local: Tensor) -> Tensor:
    return _apart(torch.stack([record.local for record in records]), local).sum(1)


def _apart(one: Tensor, two: Tensor) -> Tensor:
    """``abs(one - two)``, where NaN is equal to NaN alone, and infinity to itself."""
    equal = (one == two) | (one.isnan() & two.isnan())
    return torch.where(equal, 0, (one - two).abs().nan_to_num(torch.inf, torch.inf))
