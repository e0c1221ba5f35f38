"""The few types that every floor shares.

Shape legend, used throughout the package: N batch, C channel, L flattened space, K statistic kind.
``count`` is a number of values per channel, ``sums`` are additive over ranks, ``means = sums / count``,
``wire`` is the flat float64 vector that is sent, ``slot`` names one use of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

Direction = Literal["forward", "backward"]
Link = Callable[[Tensor], Tensor]


class Observer(Protocol):
    """Told of every collective: its slot, the payload in bytes, and the seconds that the host waited."""

    def __call__(self, slot: Slot, nbytes: int, seconds: float) -> None:
        """Take note."""
        ...


class Slot(NamedTuple):
    """One use of the wire: which layer, statistics or cotangents, in which training step, and who watches."""

    layer: str
    direction: Direction
    step: int
    observers: tuple[Observer, ...] = ()


class Moments(NamedTuple):
    """What running statistics absorb: ``mean_C`` (None where the method has no mean) and ``var_C``."""

    mean_C: Tensor | None
    var_C: Tensor


class Affine(NamedTuple):
    """A layer's learnt scale and shift, each ``[C]`` or None, and the ``eps`` that guards its division."""

    weight_C: Tensor | None
    bias_C: Tensor | None
    eps: float


class Share(Protocol):
    """Local additive sums in, shared statistics out: all that a method knows of the other ranks."""

    def __call__(self, count: int, sums_KC: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        """Return ``(link(shared means), shared count)``; both are equal on all ranks that share."""
        ...
