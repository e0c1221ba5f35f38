"""A process group among its members only, under a given name.

The only user of torch's private ``_new_process_group_helper``, ``_world`` and ``bound_device_id`` (torch 2.13; see
tests/test_private_apis.py). The public ``new_group(use_local_synchronization=True)`` derives the name from the number
of groups in this process, so members that belong to different numbers of groups wait under different names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


# docs/decisions.md#process-groups-are-made-among-their-members
def make_group(ranks: tuple[int, ...], purpose: str, timeout: timedelta) -> dist.ProcessGroup:
    """Create the group of the global ``ranks``, in this order, for ``purpose``; once per job for each pair of the two.

    Collective over ``ranks``. The backends are the job's, one for each device.
    """
    world = dist.group.WORLD
    assert world is not None, "a group needs a job"
    backend, store = c10d._world.pg_map[world]
    places = {rank: place for place, rank in enumerate(ranks)}
    name = f"distnorm {purpose} {hashlib.sha1(repr(ranks).encode(), usedforsecurity=False).hexdigest()}"
    with _unbound(world) as device:
        group, _ = c10d._new_process_group_helper(
            len(ranks),
            places[dist.get_rank()],
            list(ranks),
            c10d.Backend(backend),
            store,
            cast("c10d.GroupName", name),  # a str
            timeout=timeout,
            device_id=device,
            group_desc=f"distnorm {purpose}",
        )
    assert isinstance(group, dist.ProcessGroup)
    c10d._world.pg_group_ranks[group] = places
    return group


@contextmanager
def _unbound(world: dist.ProcessGroup) -> Iterator[torch.device | None]:
    """Unbind the job from its device in this context, and yield the device, if any.

    In a job with a device NCCL splits new communicators off, which all ranks of the job would have to do together.
    """
    device = world.bound_device_id
    world.bound_device_id = None
    try:
        yield device
    finally:
        world.bound_device_id = device
