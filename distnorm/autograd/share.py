"""What a layer's forward shares its sums through: the line to a policy (``layers.line``), or nothing at all."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distnorm.autograd.engine import repeating
from distnorm.types import Future, Link


class Exchange(Protocol):
    """A ``types.Share`` for one forward. Kernels, which know their own derivative, use its directions one by one.

    Nothing is differentiated in ``gather`` and ``scatter``.
    """

    def __call__(self, count: int, sums_KC: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        """As ``types.Share``, on the plain path."""
        ...

    def gather(self, wire: Tensor, *, held: bool, enough: bool) -> Tensor:
        """The shared counterpart of sums and count; ``held`` says that a graph keeps this exchange for a backward.

        ``enough``: the local count alone is above 1, so that nobody need look at the shared one.
        """
        ...

    def scatter(self, cotangents: Tensor) -> Future:
        """Send the cotangents of ``link(shared means)``, to get their shared counterpart."""
        ...

    def lands(self) -> bool:
        """Whether what was gathered is fit for the running statistics, and not there already."""
        ...

    def again(self, *, opaque: bool = False) -> Exchange:
        """For a repetition of the forward inside a backward pass, without a second collective.

        ``opaque``: for tensors that kernels do not take.
        """
        ...


class KeepLocal:
    """Shares nothing, and remembers what it was given."""

    shared: Tensor | None = None

    def __call__(self, count: int, sums_KC: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        """``link(sums / count)``, and the count."""
        total = sums_KC.new_full((), count)
        self.shared = torch.cat((sums_KC.detach().flatten(), total[None]))
        return link(sums_KC / total.clamp_min(1)), total

    def gather(self, wire: Tensor, *, held: bool, enough: bool) -> Tensor:
        """The local sums and count."""
        return wire

    def scatter(self, cotangents: Tensor) -> Future:
        """The cotangents."""
        return Future.completed(cotangents)

    def lands(self) -> bool:
        """Local statistics are there, unless a forward is repeated, whose first run has absorbed them."""
        return not repeating()

    def again(self, *, opaque: bool = False) -> KeepLocal:
        """Another one."""
        return KeepLocal()
