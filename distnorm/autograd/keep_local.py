"""A share among no other rank."""

from __future__ import annotations

from torch import Tensor

from distnorm.autograd.engine import repeating
from distnorm.autograd.normalize import affine_step
from distnorm.autograd.share import divisor, payload_of
from distnorm.methods import ChannelAffine, Layer
from distnorm.methods.base import identity
from distnorm.types import Future, Link, Op


class KeepLocal:
    """An ``Exchange`` that shares nothing, and keeps the local sums."""

    def __init__(self, values: int = 0, *, plain: bool = False) -> None:
        """Start a forward with so many ``values`` per channel; ``plain``: kernels may be used inside a method."""
        self.values, self._plain = values, plain
        self.shared: dict[str, Tensor] = {}

    def __call__(
        self, sums: Tensor, weight: Tensor | float, link: Link = identity, *, name: str = "", op: Op = "sum"
    ) -> tuple[Tensor, Tensor]:
        """Return ``link(sums / weight)``, and the weight; with ``op="max"`` ``link(sums)``."""
        sums = sums.double()
        payload = payload_of(sums, weight, self.values)
        self.shared[name] = payload.detach()
        total = weight.double() if isinstance(weight, Tensor) else payload[-1].detach()
        return link(sums if op == "max" else sums / divisor(total)), total

    def affine(self, x_NCL: Tensor, core: ChannelAffine, layer: Layer) -> Tensor:
        """Normalize by ``core``, with the kernels if possible."""
        return affine_step(core, x_NCL, self, layer, plain=self._plain)

    def gather(self, payload: Tensor, *, in_graph: bool, has_two_values: bool = False) -> Tensor:
        """Return the local sums and count."""
        self.shared[""] = payload
        return payload

    def scatter(self, cotangents: Tensor) -> Future:
        """Return the cotangents."""
        return Future.completed(cotangents)

    def updates_running(self) -> bool:
        """Return true, except in the repetition of a forward: its first run has updated the running statistics."""
        return not repeating()

    def for_recomputation(self, *, opaque: bool = False) -> KeepLocal:
        """Return a new instance."""
        return KeepLocal(self.values)
