"""The types that all folders of the package share.

Shape legend, used throughout the package: N batch, C channel, L flattened space, K statistic kind.
``count`` is a number of values per channel, ``sums`` are additive over ranks, ``means = sums / count``,
``payload`` is what a rank contributes to a collective, a flat float64 vector, and ``slot`` identifies one payload.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Direction = Literal["forward", "backward"]
Op = Literal["sum", "max"]
Link = Callable[[Tensor], Tensor]
Transport = Literal["torch", "mpi", "shm", "sockets", "gloo"]


class Observer(Protocol):
    """Receives events of collectives."""

    def issued(self, slot: Slot, nbytes: int) -> None:
        """Record that a collective for ``slot`` starts, with a payload of ``nbytes``."""
        ...

    def waited(self, slot: Slot, seconds: float) -> None:
        """Record that the host spent ``seconds`` in a collective for ``slot``."""
        ...


class Slot(NamedTuple):
    """Identifies one payload: layer, direction and step, with what a policy needs to share it.

    Fields:
        layer: the layer whose values these are; ``EVERY_LAYER`` for a vector of all layers.
        direction: ``"forward"`` for statistics, ``"backward"`` for cotangents.
        step: the training step of the forward pass.
        learning: whether this belongs to a step, so that values enter windows. False for a forward pass that no
            backward pass can follow (training mode under no_grad), and for cotangents while a graph is being built.
        forward_count: for cotangents, the count that the forward pass's ``reduce`` returned.
        loss_scale: the factor in the cotangents, that is the loss scale of mixed precision.
        observers: receive the events of collectives.
        passes: at the end of a step, the number of backward passes of this process since its first step, or 0 if the
            optimizer or the user ends steps. Ranks in phase have equal numbers.
        model: number of the conversion that the layer belongs to, equal on all of its ranks; 0 if none.
        name: the name of the share, which distinguishes several of one layer.
        op: ``"max"`` for maxima with their numbers of ties, see ``Group.max``.
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
    name: str = ""
    op: Op = "sum"


EVERY_LAYER = "(all layers)"


def label(layer: str, share: str) -> str:
    """Return the name of a share in messages and statistics: that of its layer, if it has no name."""
    return f"{layer}/{share}" if share else layer


class Layout(NamedTuple):
    """The payload sizes ``(layer, direction, share) -> number of values``, without counts, and the payloads' device."""

    sizes: dict[tuple[str, Direction, str], int]
    device: torch.device


class Watch(NamedTuple):
    """Means of a layer in its last step: of the local batch, those that were used, and those of all ranks if requested.

    ``entries`` is the number of steps in the means that were used. ``dropped`` is the number of steps whose sums had
    NaN or Inf.
    """

    local: Tensor
    used: Tensor
    shared: Tensor | None
    entries: int
    dropped: int


class GlobalStatistics(NamedTuple):
    """Global statistics of one share of a layer, completed at a step's end, for the running statistics.

    ``total`` is the number of values per channel in them. ``weight`` is a float64 scalar: 1 if a collective has
    completed, else 0.
    """

    layer: str
    means: Tensor
    total: Tensor
    weight: Tensor
    name: str = ""


class Future:
    """A started sum over ranks, with any transport. ``wait`` returns it.

    It stores the outcome. If ``finish`` returns (the sum, or an error on which all ranks agree), every ``wait`` returns
    or raises that. If ``finish`` raises (a timeout, Ctrl-C), the wait was interrupted, and the next ``wait`` continues
    it. A timeout counts from the beginning of a wait, and only while the process runs (``transport/patience.py``); gloo
    and NCCL count their own, from the start of the collective.
    """

    __slots__ = "_finish", "_outcome", "_poll"

    def __init__(self, finish: Callable[[], Tensor | RuntimeError], poll: Callable[[], bool] | None = None) -> None:
        """``poll``, if given, returns without waiting whether ``finish`` would return at once."""
        self._finish: Callable[[], Tensor | RuntimeError] | None = finish
        self._poll = poll
        self._outcome: Tensor | RuntimeError | None = None

    @classmethod
    def completed(cls, result: Tensor) -> Future:
        """Return a future that has completed."""
        future = cls.__new__(cls)
        future._finish, future._poll, future._outcome = None, None, result
        return future

    def done(self) -> bool:
        """Return whether ``wait`` is known to return at once. Does not wait."""
        return self._finish is None or (self._poll is not None and self._poll())

    def wait(self) -> Tensor:
        """Return the sum. On a GPU the current stream waits, not the host.

        Raises:
            RuntimeError: a rank has ended, did not take part in time, or shares something else.
        """
        if self._finish is not None:
            self._outcome = self._finish()
            self._finish = self._poll = None  # frees the memory that only the wait needed
        if isinstance(self._outcome, RuntimeError):
            raise self._outcome
        assert self._outcome is not None, "it has ended"
        return self._outcome


class Affine(NamedTuple):
    """A layer's learnable scale and shift, each ``[C]`` or None, and the ``eps`` that is added to the variance.

    ``running_var_C`` and ``updates`` (its number of updates) are for methods that correct by the running variance.
    """

    weight_C: Tensor | None
    bias_C: Tensor | None
    eps: float
    running_var_C: Tensor | None = None
    updates: Tensor | None = None


class Epilogue(NamedTuple):
    """Epilogue of a norm, computed in the same pass: ``relu(norm(x) + residual)``, or only one of the two operations.

    ``residual_NCL`` has the shape, dtype and device of x.
    """

    residual_NCL: Tensor | None = None
    relu: bool = False


class Running(NamedTuple):
    """The running statistics of a layer, updated in place; a ``momentum`` of None is the plain average over all steps.

    ``updates`` is the number of updates. If ``guarded``, moments that would make a value infinite or NaN are skipped.
    Users may have set any of the three tensors to None. ``declared`` are the buffers that the method has declared.
    """

    mean_C: Tensor | None
    var_C: Tensor | None
    updates: Tensor | None
    momentum: float | None
    guarded: bool = False
    declared: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def buffers(self) -> dict[str, Tensor | None]:
        """Return the statistics by the name of their buffer."""
        return {"running_mean": self.mean_C, "running_var": self.var_C, **self.declared}

    @property
    def is_whole(self) -> bool:
        """Whether all three tensors are there, as kernels require."""
        return self.mean_C is not None and self.var_C is not None and self.updates is not None


@dataclass
class Feeders:
    """Corrections, by name, of which convolution or linear layer precedes which converted norm. Copies share them.

    ``convert`` guesses these pairs, and the first training forward pass shows them.

    Fields:
        known: whether the pairs are final: they were observed, or an optimizer has stepped before that.
        left: layers whose outputs go to other modules too, so that their weights are not centralized.
        feeds: layers that precede other norms than guessed, with the names of these norms.
    """

    known: bool = False
    left: frozenset[str] = frozenset()
    feeds: dict[str, list[str]] = field(default_factory=dict)
