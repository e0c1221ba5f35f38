"""The few types that every floor shares.

Shape legend, used throughout the package: N batch, C channel, L flattened space, K statistic kind.
``count`` is a number of values per channel, ``sums`` are additive over ranks, ``means = sums / count``,
``wire`` is the flat float64 vector that is sent, ``slot`` names one use of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Direction = Literal["forward", "backward"]
Link = Callable[[Tensor], Tensor]
Transport = Literal["torch", "mpi", "shm", "sockets", "gloo"]


class Observer(Protocol):
    """Told of collectives."""

    def issued(self, slot: Slot, nbytes: int) -> None:
        """A collective for ``slot`` starts, with a payload of ``nbytes``."""
        ...

    def waited(self, slot: Slot, seconds: float) -> None:
        """The host spent ``seconds`` in a collective for ``slot``."""
        ...


class Slot(NamedTuple):
    """One use of the wire.

    Fields:
        layer: whose values these are; ``EVERY_LAYER`` for a vector that serves all.
        direction: statistics or cotangents.
        step: the training step of the forward.
        learning: whether this is part of a step: not a forward that no backward may follow (training mode under
            no_grad), nor cotangents while a graph is being built. Only then values enter windows.
        forward_count: for cotangents, the count that the forward's ``reduce`` returned.
        loss_scale: what cotangents are multiplied by, as a mixed-precision loss scale does.
        observers: who is told of collectives.
        passes: at the end of a step, a number that is equal on ranks in phase: the backward passes of this process
            since its first step, or 0 where the optimizer or the user ends steps.
        model: which conversion of the ranks the layer belongs to, counted alike on all of them; 0 if to none.
    """

    layer: str
    direction: Direction
    step: int
    learning: bool = True
    forward_count: Tensor | None = None
    loss_scale: Tensor | float = 1.0
    observers: tuple[Observer, ...] = ()
    passes: int = 0
    model: int = 0


EVERY_LAYER = "(all layers)"


class Layout(NamedTuple):
    """The fixed sizes of what each layer shares: ``(layer, direction) -> values``, without counts; and where."""

    sizes: dict[tuple[str, Direction], int]
    device: torch.device


class Watch(NamedTuple):
    """What a layer's last step looked like: means of the local batch, those in use, and of all ranks if asked for.

    ``entries`` is how many steps the means in use rest on, ``dropped`` how many came back with NaN or Inf.
    """

    local: Tensor
    used: Tensor
    shared: Tensor | None
    entries: int
    dropped: int


class Landed(NamedTuple):
    """Statistics of one layer that became global at a step's end, for the running statistics.

    ``total`` is how many values they rest on; ``weight`` is a float64 scalar: 1 if anything landed, else 0.
    """

    layer: str
    means: Tensor
    total: Tensor
    weight: Tensor


class Future:
    """A sum over ranks that was started: ``wait`` gives it, whoever carries it.

    It owns how the sum ended. Where ``finish``, which it is made from, returns (the sum, or an error that all ranks
    agree on), that is what every ``wait`` returns or raises. Where ``finish`` raises (a timeout, Ctrl-C), the wait was
    cut short, and the next one goes on. A timeout counts from the beginning of a wait, and only while the process runs
    (``transport/patience.py``); gloo and NCCL count their own, from the start.
    """

    __slots__ = "_finish", "_outcome", "_poll"

    def __init__(self, finish: Callable[[], Tensor | RuntimeError], poll: Callable[[], bool] | None = None) -> None:
        """``poll``, if there is such a way, says without waiting whether ``finish`` need not wait."""
        self._finish: Callable[[], Tensor | RuntimeError] | None = finish
        self._poll = poll
        self._outcome: Tensor | RuntimeError | None = None

    @classmethod
    def completed(cls, result: Tensor) -> Future:
        """One that nobody need wait for."""
        future = cls.__new__(cls)
        future._finish, future._poll, future._outcome = None, None, result
        return future

    def done(self) -> bool:
        """Whether ``wait`` is known not to wait. Does not wait."""
        return self._finish is None or (self._poll is not None and self._poll())

    def wait(self) -> Tensor:
        """The sum. On a GPU the current stream waits, not the host.

        Raises:
            RuntimeError: a rank has ended, did not take part in time, or shares something else.
        """
        if self._finish is not None:
            self._outcome = self._finish()
            self._finish = self._poll = None  # with the memory that only the wait needed
        if isinstance(self._outcome, RuntimeError):
            raise self._outcome
        assert self._outcome is not None, "it has ended"
        return self._outcome


class Moments(NamedTuple):
    """What running statistics absorb: ``mean_C`` (None where the method has no mean) and ``var_C``."""

    mean_C: Tensor | None
    var_C: Tensor


class Affine(NamedTuple):
    """A layer's learnt scale and shift, each ``[C]`` or None, and the ``eps`` that guards its division.

    ``running_var_C`` and ``updates`` (how often it was updated) serve methods that correct by it.
    """

    weight_C: Tensor | None
    bias_C: Tensor | None
    eps: float
    running_var_C: Tensor | None = None
    updates: Tensor | None = None


class Tail(NamedTuple):
    """What follows a norm and can be had in the same pass: ``relu(norm(x) + residual)``, or one of the two.

    ``residual_NCL`` has the shape, dtype and device of x.
    """

    residual_NCL: Tensor | None = None
    relu: bool = False


class Running(NamedTuple):
    """The running statistics of a layer, changed in place; a ``momentum`` of None is the plain average over all steps.

    ``updates`` is how often they were changed. ``guarded`` ones leave out moments that would make any of them infinite
    or NaN. Users may have set any of the three to None.
    """

    mean_C: Tensor | None
    var_C: Tensor | None
    updates: Tensor | None
    momentum: float | None
    guarded: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether there are all three, as kernels want them."""
        return self.mean_C is not None and self.var_C is not None and self.updates is not None


@dataclass
class Feeders:
    """Where a guess at the layers that feed converted norms was wrong, by name. Copies of a model share it.

    Fields:
        known: whether it has been looked at, or an optimizer has stepped first and the guess stands.
        left: layers whose outputs go elsewhere too.
        feeds: layers that feed other norms than guessed, and those.
    """

    known: bool = False
    left: frozenset[str] = frozenset()
    feeds: dict[str, list[str]] = field(default_factory=dict)


class Share(Protocol):
    """Local additive sums in, shared statistics out: all that a method knows of the other ranks."""

    def __call__(self, count: int, sums_KC: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        """Return ``(link(shared means), shared count)``; both are equal on all ranks that share. Differentiable."""
        ...
