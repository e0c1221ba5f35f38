"""What a policy is: a frozen description that, bound to ranks, becomes a reducer."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch.distributed as dist
from torch import Tensor

from distnorm.transport import LostGroup, Topology
from distnorm.types import Slot


class Reducer(ABC):
    """A policy at work among real ranks. Linear and self-adjoint: it serves statistics and cotangents alike."""

    def __init__(self, size: int) -> None:
        """``size``: how many ranks share."""
        self.size = size

    @abstractmethod
    def reduce(self, wire: Tensor, slot: Slot) -> Tensor:
        """The shared counterpart of the local sums ``wire``; shape and dtype kept."""

    def lands(self, step: int) -> bool:
        """Whether statistics of ``step`` are shared ones, fit for the running statistics."""
        return True


class Policy(ABC):
    """How sums are shared. Concrete policies are frozen dataclasses: values that compare, print and travel."""

    @abstractmethod
    def bind(self, topology: Topology) -> Reducer:
        """Make the groups this policy needs among the ranks of ``topology``."""

    @property
    @abstractmethod
    def collectives(self) -> float:
        """Collectives per layer, direction and step, on average."""

    @property
    @abstractmethod
    def agrees(self) -> bool:
        """Whether the running statistics are equal on all data-parallel ranks without further communication."""

    @property
    def always_lands(self) -> bool:
        """Whether the statistics of every step are shared ones (see ``Reducer.lands``)."""
        return True

    @property
    def axes(self) -> frozenset[str]:
        """The mesh axes that this policy names."""
        return frozenset()

    @property
    def scope(self) -> dist.ProcessGroup | LostGroup | None:
        """The process group of the user's that bounds which ranks this policy concerns, if it names one."""
        return None

    @property
    def staleness(self) -> int:
        """Age, in steps, of the oldest remote statistics in use."""
        return 0
