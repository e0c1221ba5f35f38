"""Determine what a recipe sends in a step of a model, by running its policy on meta tensors in a simulated job.

So policies need no second description, and custom policies can be planned too.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.compat.uninterrupted import Call
from distnorm.diagnostics.plan_cost import Reach
from distnorm.layers.layout import layout_of
from distnorm.policies import Periodic, Policy
from distnorm.recipe import Recipe
from distnorm.transport import Group, Topology
from distnorm.types import EVERY_LAYER, Future, Slot

_LATE = 10**9
"""Times the period of a policy: a step that is after any warm-up."""


class Sent(NamedTuple):
    """One sum: its group, the bytes that this rank contributes, and whether it is asynchronous."""

    reach: Reach
    nbytes: int
    background: bool


@dataclass(frozen=True)
class Traffic:
    """What rank 0 sends in ``period`` steps; ``shared`` is the number of ranks from which a layer's statistics come."""

    period: int
    sent: Counter[Sent]
    shared: int

    def collectives(self, *, background: bool) -> float:
        """Return the number of collectives per step."""
        return sum(n for each, n in self.sent.items() if each.background == background) / self.period

    @property
    def nbytes(self) -> float:
        """The payload per step, in bytes."""
        return sum(n * each.nbytes for each, n in self.sent.items()) / self.period


def traffic(recipe: Recipe, layers: Sequence[tuple[str, _BatchNorm]], world: int, local: int) -> Traffic:
    """Return what ``recipe`` sends for ``layers`` per step, after its warm-up, among ``world`` ranks.

    There are ``local`` ranks on each node, or all on one node if ``world`` is smaller. Issues no collective.

    Raises:
        ValueError: the recipe does not fit this number of ranks.
    """
    topology = _SimulatedTopology(world, local)
    layout = layout_of(layers, recipe.method)._replace(device=torch.device("meta"))
    reducer = recipe.policy.bind(topology, layout)
    period = _period(recipe.policy)
    for step in range(_LATE * period, (_LATE + 1) * period):
        counts = {}
        for (layer, direction, name), size in layout.sizes.items():
            if direction == "forward":
                slot = Slot(layer, direction, step, name=name)
                counts[layer, name] = reducer.reduce(_empty(size + 1), slot)[-1]
        for (layer, direction, name), size in reversed(layout.sizes.items()):
            if direction == "backward":
                reducer.reduce(_empty(size), Slot(layer, direction, step, forward_count=counts[layer, name], name=name))
        reducer.end_step(Slot(EVERY_LAYER, "forward", step))
    return Traffic(period, topology.sent, reducer.size)


class _SimulatedTopology(Topology):
    """``world`` ranks, ``local`` per node, seen from rank 0. Its groups only record what they are asked to sum."""

    def __init__(self, world: int, local: int) -> None:
        super().__init__(tuple(range(world)), nodes=tuple(str(rank // local) for rank in range(world)))
        self.rank = 0
        self.local = min(local, world)
        self.sent: Counter[Sent] = Counter()

    def _group(self, ranks: tuple[int, ...], background: bool = False) -> Group:
        nodes = len({self.nodes[rank] for rank in ranks})
        return _RecordingGroup(ranks, Reach(len(ranks), nodes, self.local), self.sent)


class _RecordingGroup(Group):
    def __init__(self, ranks: tuple[int, ...], reach: Reach, sent: Counter[Sent]) -> None:
        super().__init__(ranks)
        self.reach = reach
        self.sent = sent

    def _start(self, payload: Tensor, slot: Slot) -> Future:
        self._record(payload, background=False)
        return Future.completed(payload.clone())

    def _prepare_sum(self, payload_: Tensor) -> tuple[Future, Call]:
        return Future.completed(payload_), partial(self._record, payload_, background=True)

    def _broadcast(self, tensor: Tensor) -> None:
        pass

    def _record(self, payload: Tensor, *, background: bool) -> None:
        self.sent[Sent(self.reach, payload.numel() * payload.element_size(), background)] += 1


def _empty(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float64, device="meta")


def _period(policy: Policy) -> int:
    """Return the number of steps after which ``policy`` repeats."""
    own = policy.every if isinstance(policy, Periodic) else 1
    values = [getattr(policy, field.name) for field in dataclasses.fields(policy)]  # type: ignore[arg-type]
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return math.lcm(own, *(_period(part) for part in parts if isinstance(part, Policy)))
