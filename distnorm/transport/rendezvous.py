"""All-gather of short texts among ranks through the job's key-value store, without a collective of tensors.

The only user of torch's private ``_get_default_store`` and of a process group's private ``_device_types``,
``_get_backend`` and ``_timeout`` (torch 2.13; see tests/test_private_apis.py). Unlike a collective, a store shows
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
    "All ranks must convert the same model and reach its first training forward; check what those ranks do instead."
)
NOT_THERE = "They took part before: read their logs, and check whether they were killed."

SHORTEST_PAUSE_S = 1e-3


def group_timeout(process_group: dist.ProcessGroup) -> timedelta:
    """Return the timeout of the user's ``process_group``, so that groups made from it keep it."""
    for device in process_group._device_types:
        options = getattr(process_group._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return distributed_c10d.default_pg_timeout


# docs/decisions.md#ranks-compare-through-the-first-rank
def all_gather_text(ranks: tuple[int, ...], text: str, timeout: timedelta, *, doing: str = START) -> list[str]:
    """Publish ``text`` and return every rank's text, in the order of ``ranks``. Collective; no tensors are sent.

    The first rank reads them one by one and publishes all of them, equal ones once: P ranks need 2 P reads of one
    store. ``doing``: the purpose in words. Texts of different purposes are kept apart.

    Raises:
        RuntimeError: some ranks published nothing within ``timeout``; the message names them.
    """
    room = _Room(ranks, doing)
    room.publish(text)
    places = [(room.key(rank), rank) for rank in ranks]
    if dist.get_rank() == ranks[0]:
        texts = _collect(places, timeout, doing)
        room.publish_all(texts)
    else:
        texts = room.read_all(places, timeout)
    room.leave()
    room.forget_earlier()
    return texts


# docs/decisions.md#several-groups-in-one-policy
def connected(groups: list[tuple[int, ...]], timeout: timedelta) -> tuple[int, ...]:
    """Return all ranks that are connected to this one by shared groups, directly or through other ranks, in order.

    Collective over them: each rank publishes for every one of its ``groups`` which groups it has, in an order common to
    all, and continues with the groups of the ranks that it finds.

    Raises:
        RuntimeError: as ``all_gather_text``.
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

    Places are numbered per set of ranks, since members may have met different numbers of times in other sets. The
    number increases when all have met, so a rank that was interrupted before gets the same place when it tries again.
    """

    def __init__(self, ranks: tuple[int, ...], doing: str) -> None:
        self.ranks, self.doing = ranks, doing
        place = f"distnorm/{hashlib.sha1(repr((ranks, doing)).encode(), usedforsecurity=False).hexdigest()}"
        self._serial = f"{place}/serial/{dist.get_rank()}"
        self._place, self._number = place, _store().add(self._serial, 0) + 1
        self.name = f"{place}/{self._number}"

    def key(self, rank: int) -> str:
        return f"{self.name}/{rank}"

    def publish(self, text: str) -> None:
        _store().set(self.key(dist.get_rank()), text)

    def publish_all(self, texts: list[str]) -> None:
        number = {each: at for at, each in enumerate(dict.fromkeys(texts))}
        _store().set(f"{self.name}/all", json.dumps([list(number), [number[each] for each in texts]]))

    def read_all(self, places: list[tuple[str, int]], timeout: timedelta) -> list[str]:
        _await([f"{self.name}/all"], places, timeout, self.doing)
        distinct, numbers = json.loads(_store().get(f"{self.name}/all"))
        return [distinct[at] for at in numbers]

    def leave(self) -> None:
        _store().add(self._serial, 1)

    def forget_earlier(self) -> None:
        """Delete this rank's texts of the previous meeting, which all ranks have read and left."""
        if self._number > 1:
            earlier, own = f"{self._place}/{self._number - 1}", dist.get_rank()
            for name in (own, "all") if own == self.ranks[0] else (own,):
                _store().delete_key(f"{earlier}/{name}")


def _collect(places: list[tuple[str, int]], timeout: timedelta, doing: str) -> list[str]:
    """Return the texts of ``places``, pairs of a key and the rank that writes it."""
    store = _store()
    _await([key for key, _ in places], places, timeout, doing)
    return [text.decode() for text in store.multi_get([key for key, _ in places])]


def _await(keys: list[str], places: list[tuple[str, int]], timeout: timedelta, doing: str) -> None:
    """Wait for ``keys``; ``places`` name the ranks that the error blames for missing ones."""
    store, patience, pause_s = _store(), Patience(timeout), SHORTEST_PAUSE_S
    missing = keys
    # The store's own wait would not react to signals.
    while missing := missing[_present(store, missing) :]:
        if not patience.look():
            raise _absent(places, timeout, doing)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, LOOK_S)


def _absent(places: list[tuple[str, int]], timeout: timedelta, doing: str) -> RuntimeError:
    """Return the error that names the ranks that wrote nothing; if all wrote, the first rank, which has not read."""
    missing = [rank for key, rank in places if not _store().check([key])] or [places[0][1]]
    return RuntimeError(
        f"rank {dist.get_rank()} waited {timeout.total_seconds():.0f} s for ranks {missing} to {doing}. "
        + (NOT_STARTED if doing == START else NOT_THERE)
    )


def _present(store: dist.Store, keys: list[str]) -> int:
    """Return how many of the first ``keys`` exist, with few queries whether that is many or few."""
    found, more = 0, 1
    while found < len(keys) and store.check(keys[found : found + more]):
        found, more = found + more, 2 * more
    return min(found, len(keys))
