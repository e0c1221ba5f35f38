"""Ledger: count the collectives that normalization issues, their payload, and how long the host waits for them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from types import TracebackType

from torch import nn

from distnorm.attach import conversions_of
from distnorm.layers.conversion import Conversion
from distnorm.layers.module import DistNorm
from distnorm.preconditioning.handle import Preconditioner, preconditioners_of
from distnorm.types import Slot


@dataclass
class Tally:
    """Number of collectives, bytes of payload that this rank contributed, and seconds that the host spent in them."""

    collectives: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Ledger:
    """Count the statistics collectives of ``model`` on this rank, within a ``with`` block.

    Example::

        with Ledger(model) as ledger:
            train_one_epoch(model)
        print(ledger)

    They are those of converted layers, and of ``distnorm.precondition`` if it was called before. ``total`` is the sum,
    ``layers`` splits it by layer name and ``steps`` by training step. Payload is the vector that is summed, without the
    overhead of a transport. Issues no collective. Counts nothing for layers on one rank.
    """

    def __init__(self, model: nn.Module) -> None:
        """Watch the converted layers of ``model``, and what preconditions it."""
        converted = any(isinstance(each, DistNorm) for each in model.modules())
        conversions = conversions_of(model) if converted else []
        self._observed: list[Conversion | Preconditioner] = [*conversions, *preconditioners_of(model)]
        self.total = Tally()
        self.layers: defaultdict[str, Tally] = defaultdict(Tally)
        self.steps: defaultdict[int, Tally] = defaultdict(Tally)

    @property
    def collectives(self) -> int:
        """The total number of collectives."""
        return self.total.collectives

    @property
    def bytes(self) -> int:
        """The total payload in bytes."""
        return self.total.bytes

    @property
    def seconds(self) -> float:
        """The total host time in collectives, in seconds."""
        return self.total.seconds

    def __enter__(self) -> Ledger:
        """Start counting."""
        for each in self._observed:
            each.observers.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting."""
        for each in self._observed:
            each.observers.remove(self)

    def __str__(self) -> str:
        """Format a table with one row per layer."""
        rows = [f"{'layer':<40} {'collectives':>11} {'bytes':>12} {'seconds':>9}"]
        for name, tally in [*self.layers.items(), ("total", self.total)]:
            rows.append(f"{name:<40} {tally.collectives:>11} {tally.bytes:>12} {tally.seconds:>9.4f}")
        return "\n".join(rows)

    def issued(self, slot: Slot, nbytes: int) -> None:
        """Count a collective."""
        for tally in self._tallies(slot):
            tally.collectives += 1
            tally.bytes += nbytes

    def waited(self, slot: Slot, seconds: float) -> None:
        """Add host time, including that of a collective that is issued within the block and waited for after it."""
        for tally in self._tallies(slot):
            tally.seconds += seconds

    def _tallies(self, slot: Slot) -> tuple[Tally, Tally, Tally]:
        return self.total, self.layers[slot.layer], self.steps[slot.step]
