"""Rewrite a method so that norms take over what follows them: ``relu(norm(x) + residual)`` becomes one call.

A model says so in its own code, such as ::

    out = self.bn2(out)
    if self.downsample is not None:
        identity = self.downsample(x)
    out += identity
    out = self.relu(out)

and where ``downsample`` is None, nothing comes between. Then ``out = self.bn2(out, identity, relu=True, widen=False)``
stands for it. Only statements in direct sequence are joined, and only where the value between them dies, so nothing
else can have seen it; nothing changes places. All other code stays as it is, down to the line numbers.

What was read is compared with the code that runs: sources that have changed, decorators, ``super()`` and private names
make for other code, and are left alone.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from functools import cache
from itertools import zip_longest
from types import CodeType, FunctionType

from distnorm.fusion.ast import Attributes, Found, Joiner

_CODE = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars")


# docs/decisions.md#a-method-is-compiled-again-from-its-source
@cache
def rewrite(function: FunctionType, attributes: Attributes) -> tuple[FunctionType, Found] | None:
    """``function`` with tails, and what they rest on; None where there are none, or its source is not at hand."""
    code = function.__code__
    try:
        file = ast.parse("".join(inspect.findsource(function)[0]))
    except (OSError, SyntaxError, TypeError):
        return None
    definition = next(_definitions(file, code), None)
    if definition is None or not code.co_varnames or not _is_same(_compiled(definition, file, code), code):
        return None
    joiner = Joiner(function, definition, attributes)
    if _rebinds(definition, joiner.me):
        return None
    joiner.visit(definition)
    if not joiner.found.tails:
        return None
    joined = _compiled(ast.fix_missing_locations(definition), file, code)
    fused = FunctionType(joined, function.__globals__, function.__name__, function.__defaults__)
    fused.__kwdefaults__ = function.__kwdefaults__
    return fused, joiner.found


def _definitions(file: ast.Module, code: CodeType) -> Iterator[ast.FunctionDef]:
    """Where ``file`` defines what became ``code``."""
    for each in ast.walk(file):
        if isinstance(each, ast.FunctionDef) and each.lineno == code.co_firstlineno and each.name == code.co_name:
            yield each


def _compiled(definition: ast.FunctionDef, file: ast.Module, code: CodeType) -> CodeType:
    # Beside the file's imports: CPython compiles a call of an imported module's function otherwise than a method's.
    around = ast.Module([*_imports(file), definition], [])
    compiled = compile(around, code.co_filename, "exec", dont_inherit=True)
    return next(each for each in compiled.co_consts if isinstance(each, CodeType) and each.co_name == code.co_name)


def _imports(node: ast.AST) -> Iterator[ast.stmt]:
    """Those of the file itself, not of functions or classes in it."""
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


def _rebinds(definition: ast.FunctionDef, me: str) -> bool:
    """Whether the name of the first argument stands for anything else, too."""
    stored = (each for each in ast.walk(definition) if isinstance(each, ast.Name) and each.id == me)
    named = sum(isinstance(each, ast.arg) and each.arg == me for each in ast.walk(definition))
    return named > 1 or any(not isinstance(each.ctx, ast.Load) for each in stored)
