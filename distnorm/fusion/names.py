"""Which code can read the local names of a method, and the objects behind them, after a statement."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from types import CodeType, FunctionType

_SEE_FRAMES = frozenset(("locals", "vars", "eval", "exec"))


class Names:
    """The names of one method, in the source as it was before anything was merged."""

    def __init__(self, function: FunctionType, definition: ast.FunctionDef) -> None:
        codes = list(_codes(function.__code__))
        nodes = list(ast.walk(definition))
        shared = {name for code in codes for name in (*code.co_cellvars, *code.co_freevars)}
        declared = {name for each in nodes if isinstance(each, ast.Global) for name in each.names}
        self.bound = {name for code in codes for name in (*code.co_varnames, *code.co_cellvars)}
        """All local names."""
        self._private = self.bound - shared - declared
        self._hidden = not any(_SEE_FRAMES & set(code.co_names) for code in codes)
        self._reads: dict[str, list[ast.Name]] = defaultdict(list)
        for each in filter(None, map(_read, nodes)):
            self._reads[each.id].append(each)
        self._repeated = {id(one) for each in nodes if isinstance(each, _LOOPS) for one in ast.walk(each)}
        # CPython 3.11 does not tell where the expressions in a formatted string are.
        self._misplaced = {id(one) for each in nodes if isinstance(each, ast.JoinedStr) for one in ast.walk(each)}
        self.read_in_handlers = {name for each in nodes for name in _names_in_handlers(each)}
        """Names that exception handlers and ``finally`` blocks read, so after a statement that raised."""

    def is_private(self, name: str) -> bool:
        """Return whether ``name`` is a local one that no other function can read or bind."""
        return name in self._private

    def is_dead_after(self, name: str, statement: ast.stmt) -> bool:
        """Return whether nothing reads ``name`` once ``statement`` has run."""
        if not self.is_private(name) or not self._hidden or name in self.read_in_handlers:
            return False
        inside = set(map(id, ast.walk(statement)))
        reads = [each for each in self._reads[name] if id(each) not in inside]
        start = (statement.lineno, statement.col_offset)
        before = all((each.lineno, each.col_offset) < start and id(each) not in self._misplaced for each in reads)
        return not reads or (before and id(statement) not in self._repeated)


_LOOPS = (ast.For, ast.AsyncFor, ast.While)


def names_in(node: ast.AST) -> set[str]:
    """Return the names that ``node`` reads or binds."""
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}


def _read(node: ast.AST) -> ast.Name | None:
    """Return the name that ``node`` reads or deletes."""
    if isinstance(node, ast.AugAssign):
        return node.target if isinstance(node.target, ast.Name) else None
    return node if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Store) else None


def _names_in_handlers(node: ast.AST) -> Iterator[str]:
    """Yield the names that the ``except`` and ``finally`` blocks of ``node`` read."""
    if isinstance(node, ast.Try | ast.TryStar):
        for part in (*node.handlers, *node.finalbody):
            yield from (each.id for each in ast.walk(part) if isinstance(each, ast.Name))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield ``code`` and all code objects nested in it."""
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)
