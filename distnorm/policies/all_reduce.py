"""AllReduce: exact sums over a set of ranks.

Timeline: one blocking collective per layer and direction, staleness 0. The set is all data-parallel ranks, those along
one axis, blocks of neighbours, or a process group of the user's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, final

import torch.distributed as dist
from torch import Tensor

from distnorm.policies.base import Policy, Reducer
from distnorm.policies.facts import Facts
from distnorm.policies.stored import Check, fields
from distnorm.transport import Group, LostGroup, Topology, check_group, lost
from distnorm.types import Future, Layout, Slot
from distnorm.validation import Axis, Ranks, check_fields


class _GroupSum(Reducer):
    def __init__(self, group: Group, facts: Facts) -> None:
        super().__init__(group.size, facts.along([(group.ranks,)], alone=group.size == 1))
        self.group = group

    def reduce(self, wire: Tensor, slot: Slot) -> Tensor:
        return self.group.sum(wire, slot)

    def start(self, wire: Tensor, slot: Slot) -> Future:
        return self.group.start(wire, slot)


@final
@dataclass(frozen=True, kw_only=True)
class AllReduce(Policy):
    """Sum over ranks: ``reduce(wire) = sum of wire over the set``. One collective.

    Give at most one of:
        axis: ``"local"`` (ranks of a node), ``"node"`` (one rank of each node), or an axis of the mesh given to
            ``convert``.
        group_size: blocks of so many neighbouring ranks.
        process_group: the ranks of this group. Statistics travel in a group of their own over the same ranks.
    With none of them the set is all data-parallel ranks.
    """

    axis: Axis | None = None
    group_size: Ranks | None = None
    process_group: dist.ProcessGroup | LostGroup | None = None

    def __post_init__(self) -> None:
        """Validate what can be validated before ranks are known."""
        given = [name for name in ("axis", "group_size", "process_group") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"AllReduce takes one of axis, group_size, process_group; given are {given}.")
        check_group(self.process_group, "AllReduce")
        check_fields(self)

    def __repr__(self) -> str:
        """Name the ranks of an explicit group, so that equal text means equal sharing."""
        if isinstance(self.process_group, dist.ProcessGroup):
            return f"AllReduce(process_group={dist.get_process_group_ranks(self.process_group)})"
        given = self.axis if self.axis is not None else self.group_size
        name = "axis" if self.axis is not None else "group_size"
        return f"AllReduce({name}={given!r})" if given is not None else "AllReduce()"

    def __deepcopy__(self, memo: dict[int, Any]) -> AllReduce:
        """A frozen value is its own copy; process groups are never copied."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the process group, leaving a note of it."""
        if isinstance(self.process_group, dist.ProcessGroup):
            return replace(self, process_group=lost(self.process_group)).__reduce__()
        return _rebuild, (self.axis, self.group_size, self.process_group)

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """Make, or find, the group of this rank."""
        return _GroupSum(self._group(topology), self.facts)

    def _group(self, topology: Topology) -> Group:
        if isinstance(self.process_group, LostGroup):
            raise self.process_group.refuse()
        if self.process_group is not None:
            return topology.joining(self.process_group)
        if self.group_size is not None:
            return topology.blocks(self.group_size)
        return topology.along(self.axis) if self.axis is not None else topology.everyone()

    @property
    def facts(self) -> Facts:
        """One collective."""
        named = () if self.process_group is None else (self.process_group,)
        return Facts(collectives=1.0, groups=named, bounded=bool(named))

    def stores(self, layout: Layout) -> Check:
        """Nothing."""
        return fields({})


def _rebuild(axis: str | None, group_size: int | None, process_group: LostGroup | None) -> AllReduce:
    return AllReduce(axis=axis, group_size=group_size, process_group=process_group)
