"""How long a rank waits for others."""

from __future__ import annotations

import time
from datetime import timedelta

LOOK_S = 0.1
"""Who waits looks around as often: whether those it waits for still live, and for signals."""

# docs/decisions.md#suspended-time-does-not-count
LONGEST_GAP_S = 2.5 * LOOK_S


class Patience:
    """A timeout that runs only while this process does.

    A job may be suspended for longer than its timeout, all ranks at once; who goes on first must not blame the others.
    So what counts of the time between two looks is no more than looks are apart on a busy machine.
    """

    def __init__(self, timeout: timedelta) -> None:
        """Begins now."""
        self.limit_s = self._left_s = timeout.total_seconds()
        self._seen_s = time.monotonic()

    def look(self) -> float:
        """Seconds that are left; to be asked every ``LOOK_S`` or so."""
        now_s = time.monotonic()
        self._left_s -= min(now_s - self._seen_s, LONGEST_GAP_S)
        self._seen_s = now_s
        return max(0.0, self._left_s)

    def rest(self) -> timedelta:
        """What is left, for something that waits by itself."""
        return timedelta(seconds=self.look())
