"""Join calls of norms with what follows them, in the syntax tree of a method: an addition, a relu, or both.

Only statements in direct sequence are joined, and only where the value between them dies, so nothing else can have seen
it; nothing changes places.
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
    """Attributes of ``self``: converted norms, plain ReLU modules, and those that are None."""

    norms: frozenset[str] = frozenset()
    relus: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset()


@dataclass
class Found:
    """What was joined, and the attributes that this rests on."""

    tails: dict[str, str] = field(default_factory=dict)
    """By norm, what it took over."""
    relus: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    functions: set[tuple[str, ...]] = field(default_factory=set)
    """Where the code finds functional relus, such as ``("F", "relu")``."""


def is_relu(path: tuple[str, ...], names: dict[str, Any]) -> bool:
    """Whether a global name among ``names``, or an attribute of a module, stands for a functional relu."""
    value = names.get(path[0]) if path else None
    for name in path[1:]:
        value = getattr(value, name, None) if isinstance(value, ModuleType) else None
    return any(value is each for each in _RELUS)


# docs/decisions.md#addition-in-place-keeps-the-dtype
class _Tail(NamedTuple):
    """What a norm takes over: a name that is added, by ``+=`` unless ``widen``; then a relu."""

    residual: ast.Name | None = None
    widen: bool = True
    relu: bool = False

    def then(self, other: _Tail) -> _Tail | None:
        """Both, if ``other`` can come after this one."""
        if self.relu or (self.residual is not None and other.residual is not None):
            return None
        return other if self.residual is None else self._replace(relu=other.relu)

    def __str__(self) -> str:
        """In words."""
        return ", ".join(word for word, there in (("residual", self.residual), ("relu", self.relu)) if there)


class Joiner(ast.NodeTransformer):
    """Joins expressions from the inside out, then the statements around them."""

    def __init__(self, function: FunctionType, definition: ast.FunctionDef, attributes: Attributes) -> None:
        self.me = function.__code__.co_varnames[0]
        self.found = Found()
        changed = {self._own(each) for each in ast.walk(definition) if not isinstance(_context(each), ast.Load)}
        self._attributes = Attributes(*(names - changed for names in attributes))
        self._globals = function.__globals__
        codes = list(_codes(function.__code__))
        self._bound = {name for code in codes for name in (*code.co_varnames, *code.co_cellvars)}
        self._outlive = {name for code in codes for name in (*code.co_names, *code.co_cellvars, *code.co_freevars)}
        """Names that other code reads and binds, also when the function has returned: of closures, and global ones."""
        self._rescued = {name for each in ast.walk(definition) for name in _read_after_errors(each)}
        """Names whose value may be asked for where a statement has failed."""
        self._tails: dict[ast.Call, _Tail] = {}
        """Calls of norms that something was joined to."""

    # --- what an expression means ---

    def _own(self, node: ast.AST) -> str | None:
        """The name in ``self.name``."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.me:
            return node.attr
        return None

    def _is_norm(self, node: ast.AST | None) -> bool:
        """Whether ``node`` calls a norm, with one argument or with what was joined to it."""
        if not isinstance(node, ast.Call) or self._own(node.func) not in self._attributes.norms:
            return False
        plain = len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred)
        return plain or node in self._tails

    def _rectified(self, node: ast.AST) -> ast.expr | None:
        """The x in ``relu(x)``, however that is written."""
        if not isinstance(node, ast.Call):
            return None
        options = [*node.args[1:], *(each.value for each in node.keywords)]
        path = self._path(node.func)
        if node.args and is_relu(path, self._globals):
            self.found.functions.add(path)
            return node.args[0] if all(isinstance(each, ast.Constant) for each in options) else None
        if options:
            return None
        own = self._own(node.func)
        if own in self._attributes.relus and own is not None and node.args:
            self.found.relus.add(own)
            return node.args[0]
        is_method = isinstance(node.func, ast.Attribute) and node.func.attr in ("relu", "relu_") and own is None
        return node.func.value if is_method and isinstance(node.func, ast.Attribute) and not node.args else None

    def _path(self, node: ast.AST) -> tuple[str, ...]:
        """A global name, and attributes of what it stands for."""
        if isinstance(node, ast.Name) and node.id not in self._bound:
            return (node.id,)
        owner = self._path(node.value) if isinstance(node, ast.Attribute) else ()
        return (*owner, node.attr) if isinstance(node, ast.Attribute) and owner else ()

    def _is_dead(self, node: ast.stmt) -> bool:
        """``if self.name is not None`` or ``if self.name``, of what is None."""
        if not isinstance(node, ast.If) or node.orelse:
            return False
        test = node.test
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot) and len(test.ops) == 1:
            (right,) = test.comparators
            test = test.left if isinstance(right, ast.Constant) and right.value is None else test
        own = self._own(test)
        if own is None or own not in self._attributes.absent:
            return False
        self.found.absent.add(own)
        return True

    # --- expressions ---

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """``relu(norm(x))``."""
        super().generic_visit(node)
        return self._join(self._rectified(node), _Tail(relu=True)) or node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        """``norm(x) + y`` or ``y + norm(x)``, where y is a name."""
        super().generic_visit(node)
        for norm, other in _sides(node):
            joined = None if other is node.left and self._may_rebind(norm, other.id) else self._join(norm, _Tail(other))
            if joined is not None:
                return joined
        return node

    def _may_rebind(self, norm: ast.AST, name: str) -> bool:
        """Whether what ``norm`` is called with may give ``name``, which stands before it, another value."""
        bound = any(isinstance(each, ast.NamedExpr) and each.target.id == name for each in ast.walk(norm))
        runs_code = isinstance(norm, ast.Call) and not all(isinstance(each, ast.Name) for each in norm.args)
        return bound or (runs_code and name in self._outlive)

    def _join(self, norm: ast.AST | None, tail: _Tail) -> ast.Call | None:
        """The call of a norm, changed so that it has ``tail`` too; None, and nothing changed, where it cannot."""
        if not isinstance(norm, ast.Call) or not self._is_norm(norm) or tail == _Tail():
            return None
        both = self._tails.get(norm, _Tail()).then(tail)
        if both is None:
            return None
        self._tails[norm] = both
        norm.args = [norm.args[0], *([both.residual] if both.residual is not None else [])]
        options = {"relu": True} if both.relu else {}
        options |= {} if both.widen else {"widen": False}
        norm.keywords = [ast.keyword(name, ast.Constant(value)) for name, value in options.items()]
        self.found.tails[str(self._own(norm.func))] = str(both)
        return norm

    # --- statements ---

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Join the statements of every block, too."""
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
            name = None if _assigned(statement) in self._rescued else _assigned(statement)
            while name is not None and isinstance(statement, ast.Assign) and self._is_norm(statement.value):
                dead = list(takewhile(self._is_dead, waiting))
                if len(dead) == len(waiting):
                    break
                follower = waiting[len(dead)]
                tail = self._follows(follower, name)
                if tail is None or self._join(statement.value, tail) is None:
                    break
                for _ in range(len(dead) + 1):
                    waiting.popleft()
                yield from dead
                if isinstance(follower, ast.Return):
                    statement = ast.copy_location(ast.Return(statement.value), statement)
            yield statement

    def _follows(self, statement: ast.stmt, name: str) -> _Tail | None:
        """What ``statement`` does with the value of ``name``, if that is all that it does, and the value's end."""
        if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
            target, residual = statement.target, statement.value
            named = isinstance(target, ast.Name) and target.id == name
            if named and isinstance(residual, ast.Name) and residual.id != name:
                return _Tail(residual, widen=False)
        if isinstance(statement, ast.Return) and name not in self._outlive:
            return self._tail_of(statement.value, name)
        if isinstance(statement, ast.Assign) and _assigned(statement) == name:
            return self._tail_of(statement.value, name)
        return None

    def _tail_of(self, node: ast.AST | None, name: str) -> _Tail | None:
        if isinstance(node, ast.Name):
            return _Tail() if node.id == name else None
        if isinstance(node, ast.BinOp):
            tails = (
                tail.then(_Tail(other))
                for norm, other in _sides(node)
                if (tail := self._tail_of(norm, name)) is not None and other.id != name
            )
            return next(tails, None)
        inner = None if node is None else self._rectified(node)
        tail = None if inner is None else self._tail_of(inner, name)
        return None if tail is None else tail.then(_Tail(relu=True))


def _codes(code: CodeType) -> Iterator[CodeType]:
    """``code``, and all inside of it."""
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _codes(each)


def _context(node: ast.AST) -> ast.expr_context:
    return node.ctx if isinstance(node, ast.Attribute) else ast.Load()


def _read_after_errors(node: ast.AST) -> Iterator[str]:
    """Names that are read where ``node`` handles errors of its body, or cleans up after it."""
    if isinstance(node, ast.Try | ast.TryStar):
        for part in (*node.handlers, *node.finalbody):
            yield from (each.id for each in ast.walk(part) if isinstance(each, ast.Name))


def _sides(node: ast.BinOp) -> Iterator[tuple[ast.expr, ast.Name]]:
    """The two sides of a sum, that which is a name second."""
    if isinstance(node.op, ast.Add):
        for one, two in ((node.left, node.right), (node.right, node.left)):
            if isinstance(two, ast.Name):
                yield one, two


def _assigned(statement: ast.stmt) -> str | None:
    """The only name that ``statement`` assigns."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        return target.id if isinstance(target, ast.Name) else None
    return None
