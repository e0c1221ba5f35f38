"""A torch process group that sums small vectors at the lowest latency its backend allows."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from distnorm.types import Slot

EXCHANGE_LIMIT_BYTES = 128 * 1024
"""Largest vector that gloo ranks send to each other directly; ``benchmarks/exchange.py`` measures the switch point."""


@dataclass(frozen=True)
class LostGroup:
    """Stands in a pickled recipe where a process group was: groups belong to the process that made them."""

    what: str

    def refuse(self) -> RuntimeError:
        """The error that training with the copy raises."""
        return RuntimeError(
            f"this layer was unpickled, and {self.what} cannot travel in a pickle. It evaluates as it is; "
            "to train it, call distnorm.revert(model), then distnorm.convert(model, ...) with a group of this process."
        )


class TorchGroup:
    """Sums over the ranks of one process group.

    On gloo an all_reduce of P ranks costs about 2 (P - 1) message rounds and a direct exchange costs one, so small
    vectors are exchanged and added locally, in rank order: every rank gets the same bits. Larger ones, and those of
    other backends, go by all_reduce.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None,
        ranks: tuple[int, ...],
        *,
        exchange_limit_bytes: int = EXCHANGE_LIMIT_BYTES,
    ) -> None:
        """Wrap ``process_group``, which joins the global ``ranks``; None where a rank is alone."""
        self.process_group = process_group
        self.ranks = ranks
        self.size = len(ranks)
        gloo = process_group is not None and dist.get_backend(process_group) == "gloo"
        self.exchange_limit_bytes = exchange_limit_bytes if gloo else -1

    def sum(self, wire: Tensor, slot: Slot) -> Tensor:
        """Sum of ``wire`` over the group, shape and dtype kept. One collective; none in a group of one rank."""
        if self.size == 1:
            return wire
        started = time.perf_counter()
        nbytes = wire.numel() * wire.element_size()
        total = self._exchange(wire) if nbytes <= self.exchange_limit_bytes else self._all_reduce(wire)
        for observe in slot.observers:
            observe(slot, nbytes, time.perf_counter() - started)
        return total

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` with the first rank's, in place. One collective; none in a group of one rank."""
        if self.size > 1:
            dist.broadcast(tensor, src=self.ranks[0], group=self.process_group)

    def _exchange(self, wire: Tensor) -> Tensor:
        sent = wire.detach().reshape(-1).repeat(self.size)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.process_group)
        return received.view(self.size, -1).sum(0).view_as(wire)

    def _all_reduce(self, wire: Tensor) -> Tensor:
        total = wire.detach().clone()
        dist.all_reduce(total, group=self.process_group)
        return total
