"""Parse and format durations and bandwidths with units: ``30us``, ``1.5 ms``, ``10GB/s``, ``25Gbit/s``."""

from __future__ import annotations

import re

DURATIONS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
BANDWIDTHS = {"MB/s": 1e6, "GB/s": 1e9, "Mbit/s": 1e6 / 8, "Gbit/s": 1e9 / 8}


def seconds(text: str) -> float:
    """Parse a duration, and return seconds.

    Raises:
        ValueError: ``text`` is not a number of at least 0 with one of the units ns, us, ms, s.
    """
    return _read(text, DURATIONS, "a duration", "30us", zero=True)


def bytes_per_second(text: str) -> float:
    """Parse a bandwidth, and return bytes per second.

    Raises:
        ValueError: ``text`` is not a number above 0 with one of the units MB/s, GB/s, Mbit/s, Gbit/s.
    """
    return _read(text, BANDWIDTHS, "a bandwidth", "10GB/s", zero=False)


def show_seconds(value: float) -> str:
    """Format seconds in the unit that gives one to three digits before the point."""
    if value == 0:
        return "0 ms"
    for unit, size in reversed(DURATIONS.items()):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / DURATIONS['ns']:.1g} ns"


def show_bandwidth(value: float) -> str:
    """Format bytes per second in GB/s; a measurement gives infinity if the time per byte is below its noise."""
    if value == float("inf"):
        return "unlimited"
    return f"{value / 1e9:.3g} GB/s"


def show_bytes(value: float) -> str:
    """Format bytes in B, kB or MB."""
    if value < 1e3:
        return f"{value:.0f} B"
    return f"{value / 1e3:.1f} kB" if value < 1e6 else f"{value / 1e6:.1f} MB"


def _read(text: str, units: dict[str, float], what: str, example: str, *, zero: bool) -> float:
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:e-?\d+)?)\s*([A-Za-z/]+)\s*", text)
    if found is None or found[2] not in units or (float(found[1]) == 0 and not zero):
        raise ValueError(f"{text!r}: need {what} such as {example}; units are {', '.join(units)}.")
    return float(found[1]) * units[found[2]]
