"""What ranks tell each other once, before any collective: small texts through the job's key-value store.

The only user of torch's private ``_get_default_store`` and of a process group's private ``_device_types``,
``_get_backend`` and ``_timeout`` (torch 2.13; see tests/test_private_apis.py). A store, unlike a collective, can say
*which* rank did not answer.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d


def group_timeout(process_group: dist.ProcessGroup) -> timedelta:
    """The timeout that the user gave to ``process_group``, so that groups made from it keep it."""
    for device in process_group._device_types:
        options = getattr(process_group._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return distributed_c10d.default_pg_timeout


def tell_and_collect(ranks: tuple[int, ...], text: str, timeout: timedelta) -> list[str]:
    """Publish ``text`` and return every rank's, in the order of ``ranks``. Collective over ``ranks``; no tensors move.

    Raises:
        RuntimeError: some ranks published nothing within ``timeout``; the message names them.
    """
    store = distributed_c10d._get_default_store()
    rank = dist.get_rank()
    # Numbered per set of ranks: its members may have met different numbers of times in other sets.
    room = f"distnorm/{hashlib.sha1(repr(ranks).encode(), usedforsecurity=False).hexdigest()}"
    serial = store.add(f"{room}/serial/{rank}", 1)
    keys = [f"{room}/{serial}/{peer}" for peer in ranks]
    store.set(f"{room}/{serial}/{rank}", text)
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = [peer for peer, key in zip(ranks, keys, strict=True) if not store.check([key])]
        raise RuntimeError(
            f"rank {rank} waited {timeout.total_seconds():.0f} s for ranks {missing} to start training their "
            "distnorm layers. All ranks must convert the same model and reach its first training forward; look at "
            "what those ranks do instead."
        ) from error
    return [store.get(key).decode() for key in keys]
