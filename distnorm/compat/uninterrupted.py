"""Calls between which no exception comes from outside: neither Ctrl-C nor what any other signal handler raises."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable
from functools import partial

Call = Callable[[], object]


# docs/decisions.md#the-end-of-a-moving-step-is-one-block
def uninterrupted(*calls: Call) -> None:
    """Make ``calls`` one after another, of functions written in C, such as ``put``.

    Python looks for signals between instructions of its own, and here it executes none: all calls are made, or none, or
    those before one that raises by itself. A call of a Python function is made like the others, but may be interrupted.
    """
    deque(map(operator.call, calls), maxlen=0)


def put(owner: object, name: str, value: object) -> Call:
    """What sets an attribute of ``owner``, which has no ``__setattr__`` of its own."""
    return partial(setattr, owner, name, value)
