"""What ranks tell each other once, before any collective: small texts through the job's key-value store.

The only user of torch's private ``_get_default_store`` and of a process group's private ``_device_types``,
``_get_backend`` and ``_timeout`` (torch 2.13; see tests/test_private_apis.py). A store, unlike a collective, can say
*which* rank did not answer.
"""

from __future__ import annotations

import hashlib
import json
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

    The first rank reads them one by one and publishes all, equal ones once: P ranks make 2 P reads of one store.

    Raises:
        RuntimeError: some ranks published nothing within ``timeout``; the message names them.
    """
    room = _enter(ranks)
    store, own, every = _store(), dist.get_rank(), f"{room}/all"
    places = [(f"{room}/{rank}", rank) for rank in ranks]
    store.set(f"{room}/{own}", text)
    if own == ranks[0]:
        texts = _collect(places, timeout)
        number = {each: at for at, each in enumerate(dict.fromkeys(texts))}
        store.set(every, json.dumps([list(number), [number[each] for each in texts]]))
        return texts
    try:
        store.wait([every], timeout)
    except RuntimeError as error:
        raise _absent(places, timeout) from error
    distinct, numbers = json.loads(store.get(every))
    return [distinct[at] for at in numbers]


def connected(groups: list[tuple[int, ...]], timeout: timedelta) -> tuple[int, ...]:
    """All ranks that share groups with this one, with those that share groups with these, and so on; in order.

    Collective over them: each says at every one of its ``groups`` which ones it has, in an order common to all, and
    reads on where those that it meets say so.

    Raises:
        RuntimeError: as ``tell_and_collect``.
    """
    rooms = [_enter(ranks) for ranks in groups]
    text = json.dumps([[room, ranks] for room, ranks in zip(rooms, groups, strict=True)])
    for room in rooms:
        _store().set(f"{room}/{dist.get_rank()}", text)
    found = {dist.get_rank()}
    ahead = [text]
    while ahead:
        met = {rank: f"{room}/{rank}" for told in ahead for room, ranks in json.loads(told) for rank in ranks}
        new = [(key, rank) for rank, key in met.items() if rank not in found]
        ahead = _collect(new, timeout) if new else []
        found.update(met)
    return tuple(sorted(found))


def _store() -> dist.Store:
    return distributed_c10d._get_default_store()


def _enter(ranks: tuple[int, ...]) -> str:
    """The place in the store where ``ranks`` meet next."""
    # Numbered per set of ranks: its members may have met different numbers of times in other sets.
    room = f"distnorm/{hashlib.sha1(repr(ranks).encode(), usedforsecurity=False).hexdigest()}"
    return f"{room}/{_store().add(f'{room}/serial/{dist.get_rank()}', 1)}"


def _collect(places: list[tuple[str, int]], timeout: timedelta) -> list[str]:
    """What is at the keys of ``places``, each of which is written by the rank that goes with it."""
    store = _store()
    try:
        store.wait([key for key, _ in places], timeout)
    except RuntimeError as error:
        raise _absent(places, timeout) from error
    return [text.decode() for text in store.multi_get([key for key, _ in places])]


def _absent(places: list[tuple[str, int]], timeout: timedelta) -> RuntimeError:
    """What says which ranks have written nothing: or else the first one, which has not read what the others wrote."""
    missing = [rank for key, rank in places if not _store().check([key])] or [places[0][1]]
    return RuntimeError(
        f"rank {dist.get_rank()} waited {timeout.total_seconds():.0f} s for ranks {missing} to start training "
        "their distnorm layers. All ranks must convert the same model and reach its first training forward; look "
        "at what those ranks do instead."
    )
