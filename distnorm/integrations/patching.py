"""Add callbacks to constructors of other packages' classes, and to functions; signatures do not change."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def before_init(kind: type, parameter: str, callback: Callable[[Any], None]) -> None:
    """Call ``callback`` with the first argument, ``parameter``, before each construction of an instance of ``kind``."""
    original = kind.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if args or parameter in kwargs:  # if it is missing, the constructor raises its own error
            callback(args[0] if args else kwargs[parameter])
        original(self, *args, **kwargs)

    kind.__init__ = __init__  # type: ignore[misc]


def after_init(kind: type, callback: Callable[[Any], None]) -> None:
    """Call ``callback`` with each new instance of ``kind``."""
    original = kind.__init__  # type: ignore[misc]

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **kwargs)
        callback(self)

    kind.__init__ = __init__  # type: ignore[misc]


def after_call(modules: Sequence[ModuleType], name: str, callback: Callable[..., None]) -> None:
    """Call ``callback`` with result and arguments after each call of the function ``name``, which ``modules`` have."""
    original = getattr(modules[0], name)

    @functools.wraps(original)
    def called(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        callback(result, *args, **kwargs)
        return result

    for module in modules:
        setattr(module, name, called)
