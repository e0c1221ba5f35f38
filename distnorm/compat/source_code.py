"""Syntax trees of Python code: of a text, and of a function whose source can be read."""

from __future__ import annotations

import ast
import inspect
from threading import RLock
from types import FunctionType
from typing import NamedTuple

_parsing = RLock()


class Source(NamedTuple):
    """The tree of a file, and the definition of one function in it."""

    file: ast.Module
    definition: ast.FunctionDef


def parse(text: str, mode: str = "exec") -> ast.AST:
    """Return ``ast.parse(text, mode=mode)``, in one thread at a time.

    CPython 3.11 counts the depth of trees for all threads together, and fails with a SystemError if two of them parse
    (python/cpython#106905).
    """
    with _parsing:
        return ast.parse(text, mode=mode)


def source_of(function: FunctionType) -> Source | None:
    """Return the source from which ``function`` was compiled; None if it cannot be read."""
    try:
        file = parse("".join(inspect.findsource(function)[0]))
    except (OSError, SyntaxError, TypeError):
        return None
    assert isinstance(file, ast.Module)
    code = function.__code__
    for each in ast.walk(file):
        if isinstance(each, ast.FunctionDef) and each.name == code.co_name:
            if min([each.lineno, *(decorator.lineno for decorator in each.decorator_list)]) == code.co_firstlineno:
                return Source(file, each)
    return None
