"""Timeouts for waiting on other ranks."""

from __future__ import annotations

import time
from datetime import timedelta

LOOK_S = 0.1
"""The interval, in seconds, at which a waiting rank checks for signals and whether the others still run."""

# docs/decisions.md#suspended-time-does-not-count
LONGEST_GAP_S = 2.5 * LOOK_S


# docs/decisions.md#gloo-keeps-its-own-clock
class Patience:
    """A timeout that runs only while this process runs.

    A job may be suspended, all ranks at once, for longer than its timeout. The rank that continues first must not blame
    the others. The time between two checks therefore counts only up to the interval of checks on a busy machine.
    """

    def __init__(self, timeout: timedelta) -> None:
        """Start the timeout."""
        self.limit_s = self._left_s = timeout.total_seconds()
        self._seen_s = time.monotonic()

    def look(self) -> float:
        """Return the remaining time in seconds; call it about every ``LOOK_S`` seconds."""
        now_s = time.monotonic()
        self._left_s -= min(now_s - self._seen_s, LONGEST_GAP_S)
        self._seen_s = now_s
        return max(0.0, self._left_s)

    def rest(self) -> timedelta:
        """Return the remaining time, for functions with their own timeout."""
        return timedelta(seconds=self.look())
