"""AllReduce: exact sums over a set of ranks.

Timeline: one blocking collective per layer and direction, staleness 0. The set is all data-parallel ranks, the ranks
along one axis, a block of neighbouring ranks, or a process group that the user passes.
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

    def reduce(self, payload: Tensor, slot: Slot) -> Tensor:
        return self.group.max(payload, slot) if slot.op == "max" else self.group.sum(payload, slot)

    def start(self, payload: Tensor, slot: Slot) -> Future:
        return self.group.start(payload, slot)


@final
@dataclass(frozen=True, kw_only=True)
class AllReduce(Policy):
    """Sum over ranks: ``reduce(payload) = sum of payload over the set``. Issues one collective.

    Give at most one of:
        axis: ``"local"`` (the ranks of a node), ``"node"`` (one rank of each node), or an axis of the mesh passed to
            ``convert``.
        group_size: the number of neighbouring ranks in each block.
        process_group: the ranks of this group. Statistics use a separate process group over the same ranks.
    Without any of them the set is all data-parallel ranks.
    """

    axis: Axis | None = None
    group_size: Ranks | None = None
    process_group: dist.ProcessGroup | LostGroup | None = None

    def __post_init__(self) -> None:
        """Validate what does not depend on the ranks."""
        given = [name for name in ("axis", "group_size", "process_group") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"AllReduce takes one of axis, group_size, process_group; given are {given}.")
        check_group(self.process_group, "AllReduce")
        check_fields(self)

    def __repr__(self) -> str:
        """Return text that names the ranks of an explicit group: policies with equal text share equally."""
        if isinstance(self.process_group, dist.ProcessGroup):
            return f"AllReduce(process_group={dist.get_process_group_ranks(self.process_group)})"
        given = self.axis if self.axis is not None else self.group_size
        name = "axis" if self.axis is not None else "group_size"
        return f"AllReduce({name}={given!r})" if given is not None else "AllReduce()"

    def __deepcopy__(self, memo: dict[int, Any]) -> AllReduce:
        """Return ``self``: a frozen value needs no copy, and process groups cannot be copied."""
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with a ``LostGroup`` in place of the process group."""
        if isinstance(self.process_group, dist.ProcessGroup):
            return replace(self, process_group=lost(self.process_group)).__reduce__()
        return _rebuild, (self.axis, self.group_size, self.process_group)

    def bind(self, topology: Topology, layout: Layout) -> Reducer:
        """Create or look up the group of this rank."""
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
        """Return the facts of one blocking collective."""
        named = () if self.process_group is None else (self.process_group,)
        return Facts(collectives=1.0, groups=named, bounded=bool(named))

    def stores(self, layout: Layout) -> Check:
        """Return the check of an empty state."""
        return fields({})


def _rebuild(axis: str | None, group_size: int | None, process_group: LostGroup | None) -> AllReduce:
    return AllReduce(axis=axis, group_size=group_size, process_group=process_group)
