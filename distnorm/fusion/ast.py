"""Merge calls of norms with their epilogues in the syntax tree of a method: an addition, an activation, or both.

Only consecutive statements are merged, and only if no other code can read the value between them. Statements of a
branch that an attribute of ``self`` decides count as those of the block around it. The order of operations does not
change.
"""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import takewhile
from types import FunctionType
from typing import NamedTuple

from distnorm.fusion.reading import Applied, Attributes, Reader


# docs/decisions.md#addition-in-place-keeps-the-dtype
class _Epilogue(NamedTuple):
    """The epilogue of a norm: a name that is added (by ``+=`` unless ``widen``), then an activation."""

    residual: ast.Name | None = None
    widen: bool = True
    activation: Applied | None = None

    def then(self, other: _Epilogue) -> _Epilogue | None:
        """Return the epilogue of this one followed by ``other``; None if kernels cannot compute that in one pass."""
        if self.residual is None:
            return other if self.activation is None else None
        follows = other.residual is None and other.activation is not None and other.activation.name == "relu"
        return self._replace(activation=other.activation) if follows and self.activation is None else None

    def options(self) -> dict[str, ast.expr]:
        """Return the norm's keyword arguments."""
        name, parameter, _ = self.activation or (None, None, None)
        options: dict[str, ast.expr] = {} if self.residual is None else {"residual": self.residual}
        options |= {"relu": ast.Constant(True)} if name == "relu" else {}
        if name is not None and name != "relu":
            options["activation"] = ast.Constant(name)
        options |= {} if parameter is None else {"parameter": parameter}
        return options if self.widen else options | {"widen": ast.Constant(False)}

    def __str__(self) -> str:
        """Describe the epilogue as the layer's repr shows it."""
        added = [] if self.residual is None else ["residual"]
        return ", ".join([*added, *([] if self.activation is None else [self.activation.name])])


class Joiner(ast.NodeTransformer):
    """Merges nested expressions first, then consecutive statements."""

    def __init__(self, function: FunctionType, definition: ast.FunctionDef, attributes: Attributes) -> None:
        self._reader = Reader(function, definition, attributes)
        self.self_name, self.found = self._reader.self_name, self._reader.found
        self._read_in_handlers = {name for each in ast.walk(definition) for name in _names_in_handlers(each)}
        """Names that exception handlers and ``finally`` blocks read, so after a statement that raised."""
        self._epilogues: dict[ast.Call, _Epilogue] = {}
        """Calls of norms that have an epilogue."""

    # --- expressions ---

    def _is_norm(self, node: ast.AST | None) -> bool:
        """Return whether ``node`` calls a norm with one argument, or with an epilogue that was merged before."""
        if not isinstance(node, ast.Call) or self._reader.norm(node.func) is None:
            return False
        plain = len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred)
        return plain or node in self._epilogues

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Merge ``activation(norm(x))``, and leave out layers that return a norm's output as it is."""
        super().generic_visit(node)
        argument = self._reader.argument_of_identity(node)
        if isinstance(argument, ast.Call) and self._is_norm(argument):
            return argument
        applied = self._reader.activation(node)
        joined = None if applied is None else self._join(applied.argument, _Epilogue(activation=applied))
        return joined or node

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
        return bound or (runs_code and name in self._reader.outer_names)

    def _join(self, norm: ast.AST | None, epilogue: _Epilogue) -> ast.Call | None:
        """Add ``epilogue`` to the call of a norm and return the call; return None, without a change, if impossible."""
        if not isinstance(norm, ast.Call) or not self._is_norm(norm) or epilogue == _Epilogue():
            return None
        both = self._epilogues.get(norm, _Epilogue()).then(epilogue)
        if both is None:
            return None
        self._epilogues[norm] = both
        norm.keywords = [ast.keyword(name, value) for name, value in both.options().items()]
        self.found.epilogues[str(self._reader.norm(norm.func))] = str(both)
        return norm

    # --- statements ---

    def generic_visit(self, node: ast.AST) -> ast.AST:
        """Merge the statements of every block."""
        super().generic_visit(node)
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                joined = list(self._joined(self._spliced(block)))
                setattr(node, name, joined or [ast.copy_location(ast.Pass(), each) for each in block[:1]])
        return node

    def _spliced(self, block: list[ast.stmt]) -> Iterator[ast.stmt]:
        """Yield the statements, with the branch that is taken in place of an ``if`` about norms or activations."""
        for statement in block:
            concerns = isinstance(statement, ast.If) and self._reader.touches([statement])
            taken = self._reader.branch(statement) if concerns else None
            yield from [statement] if taken is None else self._spliced(taken)

    def _joined(self, block: Iterator[ast.stmt]) -> Iterator[ast.stmt]:
        waiting = deque(block)
        while waiting:
            statement = waiting.popleft()
            name = None if _assigned(statement) in self._read_in_handlers else _assigned(statement)
            while name is not None and isinstance(statement, ast.Assign) and self._is_norm(statement.value):
                skipped = list(takewhile(partial(self._is_skipped, name=name), waiting))
                if len(skipped) == len(waiting):
                    break
                follower = waiting[len(skipped)]
                epilogue = self._follows(follower, name)
                if epilogue is None or self._join(statement.value, epilogue) is None:
                    break
                for _ in range(len(skipped) + 1):
                    waiting.popleft()
                yield from (each for each in skipped if not self._is_idle(each, name))
                if isinstance(follower, ast.Return):
                    statement = ast.copy_location(ast.Return(statement.value), statement)
            yield statement

    def _is_skipped(self, statement: ast.stmt, name: str) -> bool:
        """Return whether ``statement`` does nothing: an ``if`` that is not entered, or an idle one."""
        return self._reader.branch(statement) == [] or self._is_idle(statement, name)

    def _is_idle(self, statement: ast.stmt, name: str) -> bool:
        """Return whether ``statement`` is ``name = self.layer(name)`` of a layer that returns its input."""
        if not isinstance(statement, ast.Assign) or _assigned(statement) != name:
            return False
        argument = self._reader.argument_of_identity(statement.value)
        return isinstance(argument, ast.Name) and argument.id == name

    def _follows(self, statement: ast.stmt, name: str) -> _Epilogue | None:
        """Return the epilogue in ``statement``, if it does nothing else and its result replaces ``name``."""
        if isinstance(statement, ast.AugAssign) and isinstance(statement.op, ast.Add):
            target, residual = statement.target, statement.value
            named = isinstance(target, ast.Name) and target.id == name
            if named and isinstance(residual, ast.Name) and residual.id != name:
                return _Epilogue(residual, widen=False)
        if isinstance(statement, ast.Return) and name not in self._reader.outer_names:
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
        applied = None if node is None else self._reader.activation(node)
        epilogue = None if applied is None else self._epilogue_of(applied.argument, name)
        return None if epilogue is None else epilogue.then(_Epilogue(activation=applied))


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
