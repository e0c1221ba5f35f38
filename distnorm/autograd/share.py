"""How a layer's forward shares its sums: through the policy (``layers.line``), or not at all."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distnorm.autograd.engine import repeating
from distnorm.types import Future, Link


class Exchange(Protocol):
    """A ``types.Share`` for one forward. Kernels, which know their derivative, call its two directions separately.

    ``gather`` and ``scatter`` are not differentiated.
    """

    def __call__(self, count: int, sums_KC: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        """Share as ``types.Share`` does, on the plain path."""
        ...

    def gather(self, payload: Tensor, *, in_graph: bool, has_two_values: bool) -> Tensor:
        """Return the shared sums and count; ``in_graph``: a graph keeps this exchange for a backward pass.

        ``has_two_values``: the local count alone is above 1, so the shared one needs no check.
        """
        ...

    def scatter(self, cotangents: Tensor) -> Future:
        """Start sharing the cotangents of ``link(shared means)``, and return a future of the result."""
        ...

    def updates_running(self) -> bool:
        """Return whether the gathered sums are to update the running statistics: global, and not used before."""
        ...

    def for_recomputation(self, *, opaque: bool = False) -> Exchange:
        """Return an exchange for a repetition of the forward inside a backward pass, without a second collective.

        ``opaque``: for tensors that kernels do not accept.
        """
        ...


class KeepLocal:
    """Share nothing, and keep the local sums."""

    shared: Tensor | None = None

    def __call__(self, count: int, sums_KC: Tensor, link: Link) -> tuple[Tensor, Tensor]:
        """Return ``link(sums / count)``, and the count."""
        total = sums_KC.new_full((), count)
        self.shared = torch.cat((sums_KC.detach().flatten(), total[None]))
        return link(sums_KC / total.clamp_min(1)), total

    def gather(self, payload: Tensor, *, in_graph: bool, has_two_values: bool) -> Tensor:
        """Return the local sums and count."""
        return payload

    def scatter(self, cotangents: Tensor) -> Future:
        """Return the cotangents."""
        return Future.completed(cotangents)

    def updates_running(self) -> bool:
        """Return true, except in the repetition of a forward: its first run has updated the running statistics."""
        return not repeating()

    def for_recomputation(self, *, opaque: bool = False) -> KeepLocal:
        """Return a new instance."""
        return KeepLocal()
