"""Read whether a method of a subclass passes through its base's, so that another base can be put behind it.

``forward`` of a subclass of batch norm may add to torch's, or replace it. Only in the first case may ``convert`` put a
converted layer behind the subclass. Its code tells: every path that returns must evaluate ``super().forward``, and
nothing may call torch's batch norm past it.
"""

from __future__ import annotations

import ast
import inspect
from types import FunctionType
from typing import Any

from torch import nn

from distnorm.compat.source_code import source_of

_BATCH_NORMS = frozenset("batch_norm native_batch_norm _native_batch_norm_legit batch_norm_with_update".split())


def reason_against(cls: type[nn.Module], base: type[nn.Module], name: str) -> str | None:
    """Return why the method ``name`` of ``cls`` cannot be seen to reach that of ``base``, or None if it does.

    Every class between the two that defines the method is looked at, with the methods of ``self`` that it calls.
    """
    owners = [each for each in cls.__mro__[: cls.__mro__.index(base)] if name in vars(each)]
    if not owners:
        return None
    return _Reader(cls, base).reason(owners[0], name)


class _UnreadableError(Exception):
    """Carries the reason why code cannot be judged."""


class _Reader:
    """Follows a method through the classes of ``cls`` that precede ``base``."""

    def __init__(self, cls: type[nn.Module], base: type[nn.Module]) -> None:
        self._own = cls.__mro__[: cls.__mro__.index(base)]
        self._known: dict[tuple[type, str, str], bool] = {}

    def reason(self, owner: type, name: str) -> str | None:
        try:
            passes = self.passes(owner, name, name)
        except _UnreadableError as error:
            return str(error)
        return None if passes else f"its {name} does not pass through super().{name}(...) on every path"

    def passes(self, owner: type, method: str, name: str) -> bool:
        """Return whether every call of ``owner.method`` evaluates ``super().name`` of all classes up to the base."""
        key = owner, method, name
        if key not in self._known:
            self._known[key] = False  # what calls itself does not pass by that
            self._known[key] = _Method(self, owner, method, name).passes()
        return self._known[key]

    def owner(self, method: str, after: type | None = None) -> type | None:
        """Return the class of this subclass whose ``method`` is found first, or first after ``after``."""
        start = 0 if after is None else self._own.index(after) + 1
        return next((each for each in self._own[start:] if method in vars(each)), None)

    def is_own(self, cls: object) -> bool:
        return cls in self._own


class _Method:
    """The code of one method, in which calls of ``super().name`` are looked for."""

    def __init__(self, reader: _Reader, owner: type, method: str, name: str) -> None:
        self._reader, self._owner, self._name = reader, owner, name
        function = inspect.unwrap(vars(owner)[method])
        self._place = f"{owner.__name__}.{method}"
        if not isinstance(function, FunctionType):
            raise _UnreadableError(f"{self._place} is not a plain function")
        code = function.__code__
        self._self = code.co_varnames[0] if code.co_varnames else ""
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        self._names = {**function.__globals__, **{name: cell.cell_contents for name, cell in cells}}
        source = source_of(function)
        if source is None:
            raise _UnreadableError(f"the source of {self._place} cannot be read")
        self._body = source.definition.body
        self._misses = False

    def passes(self) -> bool:
        for node in (each for statement in self._body for each in ast.walk(statement)):
            self._refuse_bypass(node)
        end = self._block(self._body, False)
        return not self._misses and end is not False

    # --- statements: whether super() was passed before (None: the end of the block is not reached) ---

    def _block(self, statements: list[ast.stmt], passed: bool | None) -> bool | None:
        for each in statements:
            if passed is not None:
                passed = self._statement(each, passed)
        return passed

    def _statement(self, node: ast.stmt, passed: bool) -> bool | None:
        match node:
            case ast.Return():
                self._misses |= not (passed or self._evaluates(node.value))
                return None
            case ast.Raise() | ast.Break() | ast.Continue():
                return None
            case ast.If():
                passed = passed or self._evaluates(node.test)
                return _either(self._block(node.body, passed), self._block(node.orelse, passed))
            case ast.For() | ast.While():  # a loop over parts of the input runs at least once
                passed = passed or self._evaluates(node.iter if isinstance(node, ast.For) else node.test)
                return self._block(node.orelse, self._block(node.body, passed) or passed)
            case ast.With():
                return self._block(node.body, passed or any(map(self._evaluates, node.items)))
            case ast.Try():
                ends = [self._block([*node.body, *node.orelse], passed)]
                ends += [self._block(each.body, passed) for each in node.handlers]
                for end in ends[1:]:
                    ends[0] = _either(ends[0], end)
                return self._block(node.finalbody, ends[0])
            case ast.FunctionDef() | ast.ClassDef():
                return passed
        return passed or self._evaluates(node)

    # --- expressions ---

    def _evaluates(self, node: ast.AST | None) -> bool:
        """Return whether evaluating ``node`` always passes super()."""
        match node:
            case None | ast.Lambda():
                return False
            case ast.IfExp():
                both = self._evaluates(node.body) and self._evaluates(node.orelse)
                return both or self._evaluates(node.test)
            case ast.BoolOp():
                return self._evaluates(node.values[0])
            case ast.Attribute() if self._is_super(node):
                return True
            case ast.Call() if self._calls_own(node):
                return True
        return any(map(self._evaluates, ast.iter_child_nodes(node)))

    def _is_super(self, node: ast.Attribute) -> bool:
        """Return whether ``node`` is ``super().name``, in either spelling, and what it finds passes too."""
        call = node.value
        if node.attr != self._name or not isinstance(call, ast.Call) or _path(call.func) != ("super",):
            return False
        after: Any = self._owner if not call.args else self._value(_path(call.args[0]))
        if not self._reader.is_own(after):
            raise _UnreadableError(f"{self._place} calls super() of a class that is not its own")
        following = self._reader.owner(self._name, after)
        return following is None or self._reader.passes(following, self._name, self._name)

    def _calls_own(self, node: ast.Call) -> bool:
        """Return whether ``node`` calls a method of this subclass by ``self``, and the method passes super()."""
        path = _path(node.func)
        owner = self._reader.owner(path[1]) if len(path) == 2 and path[0] == self._self else None
        if owner is None or not isinstance(inspect.unwrap(vars(owner)[path[1]]), FunctionType):
            return False
        return self._reader.passes(owner, path[1], self._name)

    def _refuse_bypass(self, node: ast.AST) -> None:
        path = _path(node)
        value = self._value(path) if path else None
        if path and (path[-1] in _BATCH_NORMS or getattr(value, "__name__", None) in _BATCH_NORMS):
            raise _UnreadableError(f"{self._place} calls {'.'.join(path)} itself")
        owner = self._value(path[:-1]) if len(path) > 1 and path[-1] == self._name else None
        if isinstance(owner, type) and issubclass(owner, nn.Module):
            raise _UnreadableError(f"{self._place} calls {'.'.join(path)} by its name instead of super().{self._name}")

    def _value(self, path: tuple[str, ...]) -> Any:
        """Return what a name of the function's surroundings, with attributes, stands for; None if that is not known."""
        found = self._names.get(path[0])
        for name in path[1:]:
            found = inspect.getattr_static(found, name, None)
        return found


def _either(one: bool | None, other: bool | None) -> bool | None:
    """Join two branches: a branch that ends does not count."""
    return other if one is None else one if other is None else one and other


def _path(node: ast.AST) -> tuple[str, ...]:
    """Return a name with attributes, such as ``("F", "batch_norm")``; empty for other expressions."""
    if isinstance(node, ast.Name):
        return (node.id,)
    owner = _path(node.value) if isinstance(node, ast.Attribute) else ()
    return (*owner, node.attr) if isinstance(node, ast.Attribute) and owner else ()
