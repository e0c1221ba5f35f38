"""The nearest allowed word, for error messages about misspelt ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(given: str, allowed: Iterable[str]) -> str:
    """`` (did you mean 'sync_bn'?)``, or nothing where no allowed word is near."""
    near = difflib.get_close_matches(given, list(allowed), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
