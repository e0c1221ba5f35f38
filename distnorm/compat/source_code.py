"""Syntax trees of Python code: of a text, and of a function whose source can be read."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from itertools import zip_longest
from threading import RLock
from types import CodeType, FunctionType
from typing import NamedTuple

_parsing = RLock()
_CODE = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars")


class Source(NamedTuple):
    """The imports of a file, outside of its functions and classes, and the definition of one function in it."""

    imports: list[ast.stmt]
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
                return Source(list(_imports(file)), each)
    return None


def is_what_runs(source: Source, function: FunctionType) -> bool:
    """Return whether compiling ``source`` gives the code that ``function`` runs, and nothing decorates it."""
    return not source.definition.decorator_list and _is_same(compiled(source, function.__code__), function.__code__)


def compiled(source: Source, code: CodeType) -> CodeType:
    """Return the code of ``source``, with the file name of ``code``."""
    # With the file's imports: CPython compiles calls of an imported module's functions differently from method calls.
    around = ast.Module([*source.imports, source.definition], [])
    made = compile(around, code.co_filename, "exec", dont_inherit=True)
    return next(each for each in made.co_consts if isinstance(each, CodeType) and each.co_name == code.co_name)


def _imports(node: ast.AST) -> Iterator[ast.stmt]:
    """Yield the imports of the file itself, not those in its functions and classes."""
    for each in ast.iter_child_nodes(node):
        if isinstance(each, ast.Import | ast.ImportFrom):
            yield each
        elif not isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _imports(each)


def _is_same(one: CodeType, two: CodeType) -> bool:
    if any(getattr(one, name) != getattr(two, name) for name in _CODE):
        return False
    return all(
        _is_same(a, b) if isinstance(a, CodeType) and isinstance(b, CodeType) else repr(a) == repr(b)
        for a, b in zip_longest(one.co_consts, two.co_consts)
    )
