"""The ranks that share statistics of layer inputs: they compare their layers once, and get a group of their own."""

from __future__ import annotations

import json
from itertools import zip_longest

import torch.distributed as dist

from distnorm.layers.agreement import ranks_of
from distnorm.transport import Group, TorchGroup, check_group
from distnorm.transport.make_group import make_group
from distnorm.transport.rendezvous import all_gather_text, group_timeout
from distnorm.transport.schedule import schedule_of
from distnorm.transport.topology import current_world

_groups = 0
"""The number of the last group of this process; all of its ranks use the same number."""


# docs/decisions.md#when-sums-of-layer-inputs-leave
def join(process_group: dist.ProcessGroup | None, lines: list[str]) -> Group:
    """Return a new group of the ranks of ``process_group``, or of the job, or of this process if there is no job.

    Collective over these, through the job's store. ``lines`` are what must be equal on all of them.

    Raises:
        RuntimeError: they differ, or a rank does not answer within the timeout.
        ValueError: ``process_group`` is no process group of this rank.
    """
    check_group(process_group, "precondition")
    world = current_world()
    if world is None:
        return TorchGroup(None, (0,))
    ranks = ranks_of([process_group or world])[0]
    timeout = group_timeout(process_group or world)
    global _groups
    told = all_gather_text(ranks, json.dumps([_groups + 1, lines]), timeout, doing="call distnorm.precondition")
    answers = [json.loads(text) for text in told]
    for rank, (_, other) in zip(ranks, answers, strict=True):
        _compare(ranks[0], answers[0][1], rank, other)
    _groups = max(number for number, _ in answers)
    if len(ranks) == 1:
        return TorchGroup(None, ranks)
    purpose = f"preconditioning {_groups}"
    return TorchGroup(make_group(ranks, purpose, timeout), ranks, schedule=schedule_of(ranks, purpose, timeout))


def _compare(first: int, expected: list[str], rank: int, given: list[str]) -> None:
    for line, other in zip_longest(expected, given, fillvalue="nothing"):
        if line != other:
            raise RuntimeError(
                f"distnorm.precondition: rank {rank} preconditions something else than rank {first}: [{other}] where "
                f"rank {first} has [{line}]. Call it with the same model and options on every rank."
            )
