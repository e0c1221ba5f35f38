"""How a layer's forward shares its sums: through the policy (``layers.line``), or not at all (``keep_local``)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distnorm.methods import Share
from distnorm.types import Future


class Exchange(Share, Protocol):
    """A ``methods.Share`` for one forward. Kernels, which know their derivative, call its two directions separately.

    ``gather`` and ``scatter`` are not differentiated.
    """

    shared: dict[str, Tensor]
    """What the forward has got so far, by the name of the share: sums, or maxima and ties, and the count at the end."""

    def gather(self, payload: Tensor, *, in_graph: bool, has_two_values: bool = False) -> Tensor:
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


def payload_of(sums: Tensor, weight: Tensor | float, values: int) -> Tensor:
    """Return what is shared for ``sums``, a flat vector that ends with a count.

    ``[sums, weight]`` if the weight is a number, else ``[sums, weight, values]``: policies that average over steps
    divide by the last value, which the ratio of sums and weight does not depend on.
    """
    if isinstance(weight, Tensor):
        return torch.cat((sums.flatten(), weight.double().flatten(), sums.new_full((1,), values)))
    return torch.cat((sums.flatten(), sums.new_full((1,), weight)))


def divisor(total: Tensor) -> Tensor:
    """Return ``total``, with 1 in place of 0."""
    return torch.where(total > 0, total, 1)
