"""What ranks tell each other once, before any collective: small texts through the job's key-value store.

The only user of torch's private ``_get_default_store`` and of a process group's private ``_device_types``,
``_get_backend`` and ``_timeout`` (torch 2.13; see tests/test_private_apis.py). A store, unlike a collective, can say
*which* rank did not answer.
"""

from __future__ import annotations

import hashlib
import json
import time
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from distnorm.transport.patience import LOOK_S, Patience

START = "start training their distnorm layers"
NOT_STARTED = (
    "All ranks must convert the same model and reach its first training forward; look at what those ranks do instead."
)
NOT_THERE = "They were there before: look at what those ranks say, or whether they were killed."

SHORTEST_PAUSE_S = 1e-3


def group_timeout(process_group: dist.ProcessGroup) -> timedelta:
    """The timeout that the user gave to ``process_group``, so that groups made from it keep it."""
    for device in process_group._device_types:
        options = getattr(process_group._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return distributed_c10d.default_pg_timeout


def tell_and_collect(ranks: tuple[int, ...], text: str, timeout: timedelta, *, doing: str = START) -> list[str]:
    """Publish ``text`` and return every rank's, in the order of ``ranks``. Collective over ``ranks``; no tensors move.

    ``doing``: what ranks meet for, in words; those that meet for different things do not meet.

    Raises:
        RuntimeError: some ranks published nothing within ``timeout``; the message names them.
    """
    room = _Room(ranks, doing)
    room.publish(text)
    texts = _collect([(room.key(rank), rank) for rank in ranks], timeout, doing)
    room.leave()
    room.forget_earlier()
    return texts


def connected(groups: list[tuple[int, ...]], timeout: timedelta) -> tuple[int, ...]:
    """All ranks that share groups with this one, with those that share groups with these, and so on; in order.

    Collective over them: each says at every one of its ``groups`` which ones it has, in an order common to all, and
    reads on where those that it meets say so.

    Raises:
        RuntimeError: as ``tell_and_collect``.
    """
    rooms = [_Room(ranks, START) for ranks in dict.fromkeys(groups)]
    text = json.dumps([[room.name, room.ranks] for room in rooms])
    for room in rooms:
        room.publish(text)
    found = {dist.get_rank()}
    ahead = [text]
    while ahead:
        met = {rank: f"{room}/{rank}" for told in ahead for room, ranks in json.loads(told) for rank in ranks}
        new = [(key, rank) for rank, key in met.items() if rank not in found]
        ahead = _collect(new, timeout, START) if new else []
        found.update(met)
    for room in rooms:
        room.leave()
    return tuple(sorted(found))


def _store() -> dist.Store:
    return distributed_c10d._get_default_store()


class _Room:
    """The place in the store where ``ranks`` meet next for what they are ``doing``.

    Numbered per set of ranks: its members may have met different numbers of times in other sets. The number goes up
    when all have met, so that a rank that was interrupted before comes to the same place when it tries again.
    """

    def __init__(self, ranks: tuple[int, ...], doing: str) -> None:
        self.ranks = ranks
        place = f"distnorm/{hashlib.sha1(repr((ranks, doing)).encode(), usedforsecurity=False).hexdigest()}"
        self._serial = f"{place}/serial/{dist.get_rank()}"
        self._place, self._number = place, _store().add(self._serial, 0) + 1
        self.name = f"{place}/{self._number}"

    def key(self, rank: int) -> str:
        return f"{self.name}/{rank}"

    def publish(self, text: str) -> None:
        _store().set(self.key(dist.get_rank()), text)

    def leave(self) -> None:
        _store().add(self._serial, 1)

    def forget_earlier(self) -> None:
        """Who was met here has left the room before, and read what this rank had published there."""
        if self._number > 1:
            _store().delete_key(f"{self._place}/{self._number - 1}/{dist.get_rank()}")


def _collect(places: list[tuple[str, int]], timeout: timedelta, doing: str) -> list[str]:
    """What is at the keys of ``places``, each of which is written by the rank that goes with it."""
    store, patience, pause_s = _store(), Patience(timeout), SHORTEST_PAUSE_S
    missing = [key for key, _ in places]
    # Not by the store's own wait, in which a process hears no signal.
    while missing := missing[_present(store, missing) :]:
        if not patience.look():
            absent = [rank for key, rank in places if not store.check([key])]
            raise RuntimeError(
                f"rank {dist.get_rank()} waited {timeout.total_seconds():.0f} s for ranks {absent} to {doing}. "
                + (NOT_STARTED if doing == START else NOT_THERE)
            )
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LOOK_S)
    return [store.get(key).decode() for key, _ in places]


def _present(store: dist.Store, keys: list[str]) -> int:
    """How many of the first of ``keys`` are there, in few questions whether many of them are or few."""
    found, more = 0, 1
    while found < len(keys) and store.check(keys[found : found + more]):
        found, more = found + more, 2 * more
    return min(found, len(keys))
