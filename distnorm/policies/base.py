"""The interface of a policy: a frozen description, which becomes a reducer once it is bound to ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Annotated, Any

from torch import Tensor

from distnorm.policies.facts import Completeness, Facts
from distnorm.policies.routes import Routes
from distnorm.policies.stored import Check, anything
from distnorm.transport import Topology
from distnorm.types import Future, GlobalStatistics, Layout, Slot, Watch
from distnorm.validation import kind


class Reducer(ABC):
    """A policy bound to ranks. It is linear and self-adjoint, so it serves both statistics and cotangents."""

    def __init__(self, size: int, facts: Facts | None = None) -> None:
        """Set ``size``, the number of sharing ranks, and ``facts``, which default to those of ``routes()``."""
        self.size = size
        if facts is not None:
            self.facts = facts

    @cached_property
    def facts(self) -> Facts:
        """Return what is known of this reducer among its ranks."""
        return Facts().along(self.routes())

    @abstractmethod
    def reduce(self, payload: Tensor, slot: Slot) -> Tensor:
        """Return the shared sums for the local sums ``payload``, of the same shape and dtype."""

    def start(self, payload: Tensor, slot: Slot) -> Future:
        """Start ``reduce`` and return a future. Where the policy can, the collective overlaps with computation."""
        return Future.completed(self.reduce(payload, slot))

    def routes(self) -> Routes:
        """Return the groups through which ``reduce`` shares statistics, in any step; None if they are not known."""
        return None

    def completeness(self, slot: Slot) -> Completeness:
        """Return how complete the result of ``reduce`` is for ``slot``. The default is complete."""
        return Completeness()

    def observe(self, shared: Tensor, slot: Slot, contributions: float) -> None:  # noqa: B027
        """Record sums that another, active policy has shared among ``contributions`` ranks."""

    def end_step(self, slot: Slot, *, observed: bool = False) -> list[GlobalStatistics]:
        """End the step of ``slot``; ``observed``: another policy was active in it."""
        return []

    def in_flight(self) -> list[GlobalStatistics]:
        """Return what would complete if the step ended now. Waits for it, changes nothing and issues no collective."""
        return []

    def watch(self, slot: Slot, *, exact: bool) -> dict[str, Watch]:
        """Return by layer statistics of the last step, if kept; ``exact`` adds those of all ranks, by a collective."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, tensors by name. Waits for what is in flight."""
        return {}

    def load_state_dict(self, state: dict[str, Any], *, own: bool) -> None:  # noqa: B027
        """Load ``state``, which ``Policy.stores`` has checked; ``own``: this rank of an equal job wrote it."""


# docs/decisions.md#a-policy-is-a-value
class Policy(ABC):
    """How sums are shared. Concrete policies are frozen dataclasses, which can be compared, printed and pickled."""

    @abstractmethod
    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """Create the groups that this policy needs among the ranks of ``topology``, for the layers of ``layout``."""

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """Return what is known of this policy before the ranks are known."""

    @property
    def memory(self) -> str:
        """Return a description of what its reducers store. With equal ones, policies can load each other's state."""
        return repr(self) if self.facts.keeps_cotangents else ""

    def stores(self, layout: Layout) -> Check:
        """Return the check of a saved state of its reducers for the layers of ``layout``. By default all pass."""
        return anything


APolicy = Annotated[Policy, kind(Policy, "a distnorm policy, such as AllReduce()")]
