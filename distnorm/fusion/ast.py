"""Merge calls of norms with their epilogues in the syntax tree of a method: an addition, a relu, or both.

Only consecutive statements are merged, and only if no other code can read the value between them. The order of
operations does not change.
"""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch.nn import functional

_RELUS: tuple[object, ...] = (functional.relu, functional.relu_, torch.relu, torch.relu_)


class Attributes(NamedTuple):
    """Names of attributes of ``self``: converted norms, plain ReLU modules, and those that are None."""

    norms: frozenset[str] = frozenset()
    relus: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset()


@dataclass
class Found:
    """The norms that were merged with epilogues, and the attributes and functions that this depends on."""

    epilogues: dict[str, str] = field(default_factory=dict)
    """By norm, its epilogue in words."""
    relus: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    functions: set[tuple[str, ...]] = field(default_factory=set)
    """The names by which the code calls functional relus, such as ``("F", "relu")``."""


def is_relu(path: tuple[str, ...], names: dict[str, Any]) -> bool:
    """Return whether ``path``, a name in ``names`` and attributes of modules, refers to a functional relu."""
    value = names.get(path[0]) if path else None
    for name in path[1:]:
        value = getattr(value, name, None) if isinstance(value, ModuleType) else None
    return any(value is each for each in _RELUS)


# docs/decisions.md#addition-in-place-keeps-the-dtype
class _Epilogue(NamedTuple):
    """The epilogue of a norm: a name that is added (by ``+=`` unless ``widen``), then a relu."""

    residual: ast.Name | None = None
    widen: bool = True
    relu: bool = False

    def then(self, other: _Epilogue) -> _Epilogue | None:
        """Return the epilogue of this one followed by ``other``; None if a norm cannot compute that."""
        if self.relu or (self.residual is not None and other.residual is not None):
            return None
        return other if self.residual is None else self._replace(relu=other.relu)

    def __str__(self) -> str:
        """Describe the epilogue as the layer's repr shows it."""
        return ", ".join(word for word, there in (("residual", self.residual), ("relu", self.relu)) if there)


class Joiner(ast.NodeTransformer):
    """Merges nested expressions first, then consecutive statements."""

    def __init__(self, function: FunctionType, definition: ast.FunctionDef, attributes: Attributes) -> None:
        self.self_name = function.__code__.co_varnames[0]
        self.found = Found()
        stores = (each for each in ast.walk(definition) if not isinstance(_context(each), ast.Load))
        changed = {self._self_attribute(each) for each in stores}
        self._attributes = Attributes(*(names - changed for names in attributes))
        self._globals = function.__globals__
        codes = list(_codes(function.__code__))
        self._bound = {name for code in codes for name in (*code.co_varnames, *code.co_cellvars)}
        self._outer_names = {name for code in codes for name in (*code.co_names, *code.co_cellvars, *code.co_freevars)}
        """Names that other code can read after the function has returned: global names and those of closures."""
        self._read_in_handlers = {name for each in ast.walk(definition) for name in _names_in_handlers(each)}
        """Names that exception handlers and ``finally`` blocks read, so after a statement that raised."""
        self._epilogues: dict[ast.Call, _Epilogue] = {}
        """Calls of norms that have an epilogue."""

    # --- recognize expressions ---

    def _self_attribute(self, node: ast.AST) -> str | None:
        """Return the name in ``self.name``, or None."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.self_name:
            return node.attr
        return None

    def _is_norm(self, node: ast.AST | None) -> bool:
        """Return whether ``node`` calls a norm with one argument, or with an epilogue that was merged before."""
        if not isinstance(node, ast.Call) or self._self_attribute(node.func) not in self._attributes.norms:
            return False
        plain = len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred)
        return plain or node in self._epilogues

    def _relu_argument(self, node: ast.AST) -> ast.expr | None:
        """Return the x in ``relu(x)``, in any spelling, or None."""
        if not isinstance(node, ast.Call):
            return None
        options = [*node.args[1:], *(each.value for each in node.keywords)]
        path = self._path(node.func)
        if node.args and is_relu(path, self._globals):
            self.found.functions.add(path)
            return node.args[0] if all(isinstance(each, ast.Constant) for each in options) else None
        if options:
            return None
        attribute = self._self_attribute(node.func)
        if attribute in self._attributes.relus and attribute is not None and node.args:
            self.found.relus.add(attribute)
            return node.args[0]
        is_method = isinstance(node.func, ast.Attribute) and node.func.attr in ("relu", "relu_") and attribute is None
        return node.func.value if is_method and isinstance(node.func, ast.Attribute) and not node.args else None

    def _path(self, node: ast.AST) -> tuple[str, ...]:
        """Return a global name with attributes, such as ``("F", "relu")``, or an empty tuple."""
        if isinstance(node, ast.Name) and node.id not in self._bound:
            return (node.id,)
        owner = self._path(node.value) if isinstance(node, ast.Attribute) else ()
        return (*owner, node.attr) if isinstance(node, ast.Attribute) and owner else ()

    def _is_skipped(self, node: ast.stmt) -> bool:
        """Return whether ``node`` is ``if self.name is not None`` or ``if self.name`` where ``self.name`` is None."""
        if not isinstance(node, ast.If) or node.orelse:
            return False
        test = node.test
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot) and len(test.ops) == 1:
            (right,) = test.comparators
            test = test.left if isinstance(right, ast.Constant) and right.value is None else test
        attribute = self._self_attribute(test)
        if attribute is None or attribute not in self._attributes.absent:
            return False
        self.found.absent.add(attribute)
        return True

    # --- expressions ---

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Merge ``relu(norm(x))``."""
        super().generic_visit(node)
        return self._join(self._relu_argument(node), _Epilogue(relu=True)) or node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        """Merge ``norm(x) + y`` or ``y + norm(x)``, where y is a name."""
        super().generic_visit(node)
        for norm, other in _sides(node):
            if other is node.left and self._may_rebind(norm, other.id):
                continue
            joined = self._join(norm, _Epilogue(other))
            if joined is not None:
                return joined
        return node

    def _may_rebind(self, norm: ast.AST, name: str) -> bool:
        """Return whether evaluating the argument of ``norm`` may rebind ``name``, which is read before it."""
        bound = any(isinstance(each, ast.NamedExpr) and each.target.id == name for each in ast.walk(norm))
        runs_code = isinstance(norm, ast.Call) and not all(isinstance(each, ast.Name) for each in norm.args)
        return bound or (runs_code and name in self._outer_names)

    def _join(self, norm: ast.AST | None, epilogue: _Epilogue) -> ast.Call | None:
        """Add ``epilogue`` to the call of a norm and return the call; return None, without a change, if impossible."""
        if not isinstance(norm, ast.Call) or not self._is_norm(norm) or epilogue == _Epilogue():
            return None
        both = self._epilogues.get(norm, _Epilogue()).then(epilogue)
        if both is None:
            return None
        self._epilogues[norm] = both
        options: dict[str, ast.expr] = {} if both.residual is None else {"residual": both.residual}
        options |= {"relu": ast.Constant(True)} if both.relu else {}
        options |= {} if both.widen else {"widen": ast.Constant(False)}
        norm.keywords = [ast.keyword(name, value) for name, value in options.items()]
        self.found.epilogues[str(self._self_attribute(norm.func))] = str(both)
        return norm

    # --- statements ---

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Merge the statements of every block."""
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                setattr(node, name, list(self._joined(block)))
        return node

    def _joined(self, block: list[ast.stmt]) -> Iterator[ast.stmt]:
        waiting = deque(block)
        while waiting:
            statement = waiting.popleft()
            name = None if _assigned(statement) in self._read_in_handlers else _assigned(statement)
            while name is not None and isinstance(statement, ast.Assign) and self._is_norm(statement.value):
                skipped = list(takewhile(self._is_skipped, waiting))
                if len(skipped) == len(waiting):
                    break
                follower = waiting[len(skipped)]
                epilogue = self._follows(follower, name)
                if epilogue is None or self._join(statement.value, epilogue) is None:
                    break
                for _ in range(len(skipped) + 1):
                    waiting.popleft()
                yield from skipped
                if isinstance(follower, ast.Return):
                    statement = ast.copy_location(ast.Return(statement.value), statement)
            yield statement

    def _follows(self, statement: ast.stmt, name: str) -> _Epilogue | None:
        """Return the epilogue in ``statement``, if it does nothing else and its result replaces ``name``."""
        if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
            target, residual = statement.target, statement.value
            named = isinstance(target, ast.Name) and target.id == name
            if named and isinstance(residual, ast.Name) and residual.id != name:
                return _Epilogue(residual, widen=False)
        if isinstance(statement, ast.Return) and name not in self._outer_names:
            return self._epilogue_of(statement.value, name)
        if isinstance(statement, ast.Assign) and _assigned(statement) == name:
            return self._epilogue_of(statement.value, name)
        return None

    def _epilogue_of(self, node: ast.AST | None, name: str) -> _Epilogue | None:
        if isinstance(node, ast.Name):
            return _Epilogue() if node.id == name else None
        if isinstance(node, ast.BinOp):
            epilogues = (
                epilogue.then(_Epilogue(other))
                for norm, other in _sides(node)
                if (epilogue := self._epilogue_of(norm, name)) is not None and other.id != name
            )
            return next(epilogues, None)
        inner = None if node is None else self._relu_argument(node)
        epilogue = None if inner is None else self._epilogue_of(inner, name)
        return None if epilogue is None else epilogue.then(_Epilogue(relu=True))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield ``code`` and all code objects nested in it."""
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


def _context(node: ast.AST) -> ast.expr_context:
    return node.ctx if isinstance(node, ast.Attribute) else ast.Load()


def _names_in_handlers(node: ast.AST) -> Iterator[str]:
    """Yield the names that the ``except`` and ``finally`` blocks of ``node`` read."""
    if isinstance(node, ast.Try | ast.TryStar):
        for part in (*node.handlers, *node.finalbody):
            yield from (each.id for each in ast.walk(part) if isinstance(each, ast.Name))


def _sides(node: ast.BinOp) -> Iterator[tuple[ast.expr, ast.Name]]:
    """Yield the two sides of an addition, the one that is a name second; both ways if both are names."""
    if isinstance(node.op, ast.Add):
        for one, two in ((node.left, node.right), (node.right, node.left)):
            if isinstance(two, ast.Name):
                yield one, two


def _assigned(statement: ast.stmt) -> str | None:
    """Return the name that ``statement`` assigns, if it is a single one."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        return target.id if isinstance(target, ast.Name) else None
    return None
