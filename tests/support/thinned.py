"""Test parameters of which ``make test`` takes a part, and ``make test-all`` all."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(values: Iterable[Any], *, every: int) -> list[Any]:
    """Return ``values`` as test parameters, all of them slow tests but the first of each ``every``."""
    return [
        pytest.param(*(value if type(value) is tuple else (value,)), marks=() if at % every == 0 else pytest.mark.slow)
        for at, value in enumerate(values)
    ]
