"""What a policy is: a frozen description that, bound to ranks, becomes a reducer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Annotated, Any

from torch import Tensor

from distnorm.policies.facts import Completeness, Facts
from distnorm.policies.routes import Routes
from distnorm.policies.stored import Check, anything
from distnorm.transport import Topology
from distnorm.types import Future, Landed, Layout, Slot, Watch
from distnorm.validation import kind


class Reducer(ABC):
    """A policy at work among real ranks. Linear and self-adjoint: it serves statistics and cotangents alike."""

    def __init__(self, size: int, facts: Facts | None = None) -> None:
        """``size``: how many ranks share. ``facts``: what is known of it among them; by default ``routes()``."""
        self.size = size
        if facts is not None:
            self.facts = facts

    @cached_property
    def facts(self) -> Facts:
        """What is known of it among its ranks."""
        return Facts().along(self.routes())

    @abstractmethod
    def reduce(self, wire: Tensor, slot: Slot) -> Tensor:
        """The shared counterpart of the local sums ``wire``; shape and dtype kept."""

    def start(self, wire: Tensor, slot: Slot) -> Future:
        """``reduce``, whose result is asked for later: where the policy can, what comes meanwhile hides its waiting."""
        return Future.completed(self.reduce(wire, slot))

    def routes(self) -> Routes:
        """By which groups ``reduce`` joins statistics, in one step or another; None if that is not known."""
        return None

    def completeness(self, slot: Slot) -> Completeness:
        """How much of what it shares is in what ``reduce`` returns for ``slot``. By default all."""
        return Completeness()

    def observe(self, shared: Tensor, slot: Slot, contributions: float) -> None:  # noqa: B027
        """Take note of sums that another policy has shared among ``contributions`` ranks, while it is in charge."""

    def end_step(self, slot: Slot, *, observed: bool = False) -> list[Landed]:
        """End the step of ``slot``; ``observed`` says that another policy was in charge of it."""
        return []

    def in_flight(self) -> list[Landed]:
        """What would land if the step ended now. Waits for it, and changes nothing; no collective."""
        return []

    def watch(self, slot: Slot, *, exact: bool) -> dict[str, Watch]:
        """By layer, statistics of the last step, if kept; ``exact`` adds those of all ranks, by a collective."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, tensors by name; waits for what is in flight."""
        return {}

    def load_state_dict(self, state: dict[str, Any], *, own: bool) -> None:  # noqa: B027
        """Take over ``state``, which ``Policy.stores`` has checked; ``own``: this very rank wrote it, in such a job."""


# docs/decisions.md#a-policy-is-a-value
class Policy(ABC):
    """How sums are shared. Concrete policies are frozen dataclasses: values that compare, print and travel."""

    @abstractmethod
    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """Make the groups this policy needs among the ranks of ``topology``, for layers of ``layout``."""

    @property
    @abstractmethod
    def facts(self) -> Facts:
        """What is known of it before ranks are."""

    @property
    def memory(self) -> str:
        """What its reducers remember, in words: policies of equal ones can go on from each other's state."""
        return repr(self) if self.facts.keeps_cotangents else ""

    def stores(self, layout: Layout) -> Check:
        """What checks a state for its reducers among layers of ``layout``. By default everything passes."""
        return anything


APolicy = Annotated[Policy, kind(Policy, "a distnorm policy, such as AllReduce()")]
