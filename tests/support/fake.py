"""A fake world of any size in one process: collectives return at once and move nothing.

Good for counting collectives and for everything that depends on the size of the world; wrong for values. This is the
only file that touches torch's private fake process group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # noqa: F401  # registers the backend "fake"


class EchoStore(dist.Store):
    """A store in which every other rank has written what this rank wrote.

    A key that ends in a rank, ``distnorm/layout/5``, and was not written answers with what this rank wrote at the same
    place, ``distnorm/layout/0``. Nothing ever waits.
    """

    def __init__(self, rank: int = 0) -> None:
        super().__init__()
        self.rank = rank
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        """Write a value."""
        self.values[key] = value.encode() if isinstance(value, str) else bytes(value)

    def get(self, key: str) -> bytes:
        """Read what was written here, or what this rank wrote in place of another one."""
        if key in self.values:
            return self.values[key]
        place, _, last = key.rpartition("/")
        echo = f"{place}/{self.rank}"
        if not last.isdigit() or echo not in self.values:
            raise KeyError(f"{key!r} was never written, and neither was {echo!r}; present: {sorted(self.values)}")
        return self.values[echo]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Read several."""
        return [self.get(key) for key in keys]

    def add(self, key: str, amount: int) -> int:
        """Count."""
        total = int(self.values.get(key, b"0")) + amount
        self.values[key] = str(total).encode()
        return total

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Return at once: all ranks are there."""

    def check(self, keys: list[str]) -> bool:
        """All ranks have written everything."""
        return True

    # torch calls these two by their C++ names
    def deleteKey(self, key: str) -> bool:
        """Remove a key; true if it was there."""
        return self.values.pop(key, None) is not None

    def getNumKeys(self) -> int:
        """How many keys this rank has written."""
        return len(self.values)


@contextmanager
def fake_world(world_size: int = 64, rank: int = 0) -> Iterator[EchoStore]:
    """Make this process one rank of a fake world; the default process group exists inside the block."""
    store = EchoStore(rank)
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=store)
    try:
        yield store
    finally:
        dist.destroy_process_group()
