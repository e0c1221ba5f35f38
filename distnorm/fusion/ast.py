"""Merge calls of norms with their epilogues in the syntax tree of a method: an addition, an activation, or both.

Only consecutive statements are merged, and only if no other code can read the value between them. Statements of a
branch that an attribute of ``self`` decides count as those of the block around it. Norms, random numbers and all that
has effects stay in their order. A module that ends in a norm is called like one, by ``FORWARD``.
"""

from __future__ import annotations

import ast
from collections import deque
from collections.abc import Iterator
from functools import partial
from itertools import takewhile
from types import FunctionType

from distnorm.fusion.names import names_in
from distnorm.fusion.parts import EpilogueCode, Follower, always_returns, assigning, returned
from distnorm.fusion.reading import Attributes, Reader, assigned

FORWARD = "_forward_with_epilogue"
"""The method of modules that end in a norm: ``forward`` of one argument, and the norm's keyword arguments."""
_GIVEN = "_epilogue"
"""Its keyword arguments."""


class Joiner(ast.NodeTransformer):
    """Merges nested expressions first, then consecutive statements.

    With ``opens``, the norms whose output the method returns also take the epilogue that it is called with.
    """

    def __init__(
        self, function: FunctionType, definition: ast.FunctionDef, attributes: Attributes, *, opens: bool
    ) -> None:
        self._reader = Reader(function, definition, attributes)
        self._names, self._opens = self._reader.names, opens
        self.self_name, self.found = self._reader.self_name, self._reader.found
        self._epilogues: dict[ast.Call, EpilogueCode] = {}
        """Calls of norms that have an epilogue."""

    def join(self, definition: ast.FunctionDef) -> bool:
        """Merge what can be merged in ``definition``, and return whether that is what is wanted."""
        self.visit(definition)
        done = self._open(definition) if self._opens else bool(self.found.epilogues)
        for call in (each for each in ast.walk(definition) if isinstance(each, ast.Call) and each in self._epilogues):
            if self._reader.ends_in_norm(call.func):
                call.func = ast.copy_location(ast.Attribute(call.func, FORWARD, ast.Load()), call.func)
        return done

    def _open(self, definition: ast.FunctionDef) -> bool:
        """Hand the keyword arguments of the method on to the norms that it returns the output of, if it always does."""
        for call in returned(definition.body):
            if not isinstance(call, ast.Call) or not self._is_norm(call) or call in self._epilogues:
                return False
            self._epilogues[call] = EpilogueCode()
            call.keywords.append(ast.keyword(None, ast.Name(_GIVEN, ast.Load())))
            self.found.last.add(str(self._reader.norm(call.func)))
        if definition.args.kwarg is not None or not always_returns(definition.body):
            return False
        definition.args.kwarg = ast.arg(_GIVEN)
        return True

    # --- expressions ---

    def _is_norm(self, node: ast.AST | None) -> bool:
        """Return whether ``node`` calls a norm with one argument, or with an epilogue that was merged before."""
        if not isinstance(node, ast.Call) or self._reader.norm(node.func) is None:
            return False
        plain = len(node.args) == 1 and not node.keywords and not isinstance(node.args[0], ast.Starred)
        return plain or node in self._epilogues

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        """Leave out the side that is not taken, if that is known."""
        super().generic_visit(node)
        return self._reader.side(node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Merge ``activation(norm(x))``, and leave out layers that return a norm's output as it is."""
        super().generic_visit(node)
        argument = self._reader.argument_of_identity(node)
        if isinstance(argument, ast.Call) and self._is_norm(argument):
            return argument
        applied = self._reader.activation(node)
        joined = None if applied is None else self._join(applied.argument, EpilogueCode(activation=applied))
        return joined or node

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        """Merge ``y + norm(x)``, where y may be any expression if x is a name, and ``norm(x) + y`` of a quiet y."""
        super().generic_visit(node)
        if not isinstance(node.op, ast.Add):
            return node
        left, right = map(self._reader.without_identities, (node.left, node.right))
        joined = self._join(right, EpilogueCode(left)) if self._may_swap(left, right) else None
        if joined is None and self._is_quiet(right, left):
            joined = self._join(left, EpilogueCode(right))
        return joined or node

    def _may_swap(self, left: ast.expr, norm: ast.expr) -> bool:
        """Return whether ``left`` may be evaluated after the argument of ``norm``, which stands behind it."""
        if not isinstance(norm, ast.Call) or not self._is_norm(norm):
            return False
        if isinstance(left, ast.Constant):
            return True
        if isinstance(left, ast.Name):
            rebinds = any(isinstance(each, ast.NamedExpr) and each.target.id == left.id for each in ast.walk(norm))
            return not rebinds and (self._names.is_private(left.id) or isinstance(norm.args[0], ast.Name))
        argument = norm.args[0]
        bound = {each.target.id for each in ast.walk(left) if isinstance(each, ast.NamedExpr)}
        return isinstance(argument, ast.Name) and self._names.is_private(argument.id) and argument.id not in bound

    def _is_quiet(self, node: ast.expr, norm: ast.expr) -> bool:
        """Return whether ``node`` may be evaluated between the argument of ``norm`` and the norm itself.

        A module that ends in a norm may do anything before that norm, such as to change its input in place.
        """
        if not isinstance(norm, ast.Call) or not self._is_norm(norm):
            return False
        return self._reader.is_quiet(node, layers=not self._reader.ends_in_norm(norm.func))

    def _join(self, norm: ast.AST | None, epilogue: EpilogueCode) -> ast.Call | None:
        """Add ``epilogue`` to the call of a norm and return the call; return None, without a change, if impossible."""
        if not isinstance(norm, ast.Call) or not self._is_norm(norm):
            return None
        if epilogue == EpilogueCode():
            return norm
        both = self._epilogues.get(norm, EpilogueCode()).then(epilogue)
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
            concerns = isinstance(statement, ast.If) and self._reader.touches(statement)
            taken = self._reader.branch(statement) if concerns else None
            yield from [statement] if taken is None else self._spliced(taken)

    def _joined(self, block: Iterator[ast.stmt]) -> Iterator[ast.stmt]:
        waiting = deque(block)
        fresh: dict[str, str] = {}
        while waiting:
            statement = self._as_assignment(waiting.popleft(), fresh)
            skipped, statement = self._with_followers(statement, waiting, fresh)
            runs = [each for each in (*skipped, statement) if not self._is_skipped(each, "")]
            fresh = {name: norm for name, norm in fresh.items() if not any(name in names_in(each) for each in runs)}
            name = assigned(statement)
            if name is not None and isinstance(statement, ast.Assign) and self._is_norm(statement.value):
                assert isinstance(statement.value, ast.Call)
                fresh |= {name: str(self._reader.norm(statement.value.func))} if self._names.is_private(name) else {}
            yield from (*skipped, statement)

    def _as_assignment(self, statement: ast.stmt, fresh: dict[str, str]) -> ast.stmt:
        """Return ``name += norm(x)`` as an assignment, if nobody else can hold the object that it changes in place.

        ``fresh`` has the names of such objects, and the norms that they are outputs of.
        """
        if not isinstance(statement, ast.AugAssign) or not isinstance(statement.op, ast.Add):
            return statement
        target, value = statement.target, self._reader.without_identities(statement.value)
        if not isinstance(target, ast.Name) or target.id not in fresh or target.id in names_in(value):
            return statement
        name = ast.copy_location(ast.Name(target.id, ast.Load()), target)
        if self._join(value, EpilogueCode(name, widen=None)) is None:
            return statement
        self.found.fresh.add(fresh[target.id])
        return ast.copy_location(ast.Assign([target], value), statement)

    def _with_followers(
        self, statement: ast.stmt, waiting: deque[ast.stmt], fresh: dict[str, str]
    ) -> tuple[list[ast.stmt], ast.stmt]:
        """Return ``statement`` merged with those ``waiting`` that follow it, and what is to run before."""
        before: list[ast.stmt] = []
        while (name := assigned(statement)) is not None and name not in self._names.read_in_handlers:
            assert isinstance(statement, ast.Assign)
            norm = statement.value
            skipped = list(takewhile(partial(self._is_skipped, name=name), waiting)) if self._is_norm(norm) else waiting
            if len(skipped) == len(waiting):
                break
            follower = self._follows(waiting[len(skipped)], name, norm, fresh)
            if follower is None or self._join(norm, follower.epilogue) is None:
                break
            if follower.epilogue.widen is None:
                self.found.fresh.add(fresh[follower.target])
            for _ in range(len(skipped) + 1):
                waiting.popleft()
            before += [each for each in skipped if not self._is_idle(each)]
            statement = assigning(statement, follower.target)
        return before, statement

    def _is_skipped(self, statement: ast.stmt, name: str) -> bool:
        """Return whether ``statement`` may run before the norm whose output is ``name``, or never."""
        if self._reader.branch(statement) == [] or self._is_idle(statement):
            return True
        return assigned(statement) != name and self._reader.held_attribute(statement) is not None

    def _is_idle(self, statement: ast.stmt) -> bool:
        """Return whether ``statement`` is ``name = self.layer(name)`` of a layer that returns its input."""
        if not isinstance(statement, ast.Assign):
            return False
        argument = self._reader.argument_of_identity(statement.value)
        return isinstance(argument, ast.Name) and argument.id == assigned(statement)

    def _follows(self, statement: ast.stmt, name: str, norm: ast.expr, fresh: dict[str, str]) -> Follower | None:
        """Return what ``statement`` computes of ``name``, the output of ``norm``, if it does nothing else."""
        if isinstance(statement, ast.AugAssign):
            return self._follows_in_place(statement, name, norm, fresh)
        if isinstance(statement, ast.Return):
            target, allowed = "", self._names.is_private(name)
        else:
            target = assigned(statement) or ""
            allowed = target == name or (target != "" and self._names.is_dead_after(name, statement))
        if not allowed or not isinstance(statement, ast.Return | ast.Assign):
            return None
        epilogue = self._epilogue_of(statement.value, name, norm)
        merges = epilogue is not None and (epilogue != EpilogueCode() or (target == "" and self._opens))
        return Follower(epilogue, target) if epilogue is not None and merges else None

    def _follows_in_place(
        self, statement: ast.AugAssign, name: str, norm: ast.expr, fresh: dict[str, str]
    ) -> Follower | None:
        if not isinstance(statement.op, ast.Add) or not isinstance(statement.target, ast.Name):
            return None
        target, value = statement.target.id, self._reader.without_identities(statement.value)
        if target == name:
            quiet = self._is_quiet(value, norm) and name not in names_in(value)
            return Follower(EpilogueCode(value, widen=False), name) if quiet else None
        added = isinstance(value, ast.Name) and value.id == name and target in fresh
        if not added or not self._names.is_dead_after(name, statement):
            return None
        return Follower(EpilogueCode(ast.copy_location(ast.Name(target, ast.Load()), value), widen=None), target)

    def _epilogue_of(self, node: ast.expr | None, name: str, norm: ast.expr) -> EpilogueCode | None:
        """Return what ``node`` computes of ``name``, the output of ``norm``."""
        if node is None:
            return None
        node = self._reader.without_identities(node)
        if isinstance(node, ast.Name):
            return EpilogueCode() if node.id == name else None
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            for one, two in ((node.left, node.right), (node.right, node.left)):
                epilogue, other = self._epilogue_of(one, name, norm), self._reader.without_identities(two)
                if epilogue is not None and name not in names_in(other) and self._is_quiet(other, norm):
                    return epilogue.then(EpilogueCode(other))
            return None
        applied = self._reader.activation(node)
        epilogue = None if applied is None else self._epilogue_of(applied.argument, name, norm)
        return None if epilogue is None else epilogue.then(EpilogueCode(activation=applied))
