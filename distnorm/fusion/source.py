"""Rewrite a method so that norms compute their epilogues: ``relu(norm(x) + residual)`` becomes one call.

For example, in the code ::

    out = self.bn2(out)
    if self.downsample is not None:
        identity = self.downsample(x)
    out += identity
    out = self.relu(out)

nothing happens between the norm and the addition if ``downsample`` is None. All of it is then replaced by ``out =
self.bn2(out, identity, relu=True, widen=False)``. ``ast.py`` says which statements are merged. All other code is
unchanged, with its line numbers.

The source is compiled unchanged first, and compared with the code that runs. They differ if the file has been edited,
or for decorators, ``super()`` and private names; such methods are not rewritten.
"""

from __future__ import annotations

import ast
import copy
from functools import cache
from types import CodeType, FunctionType

from distnorm.compat.source_code import Source, compiled, is_what_runs, source_of
from distnorm.fusion.ast import Joiner
from distnorm.fusion.reading import Attributes, Found


# docs/decisions.md#a-method-is-compiled-again-from-its-source
@cache
def rewrite(
    function: FunctionType, attributes: Attributes, *, opens: bool = False
) -> tuple[FunctionType, Found] | None:
    """Return ``function`` with fused epilogues, and what they depend on; None if it has none or no readable source.

    With ``opens`` the returned function takes the keyword arguments of norms, and hands them on to those whose output
    it returns; None if it returns anything else.
    """
    code = function.__code__
    source = _readable(function, code)
    if source is None or not code.co_varnames:
        return None
    definition = copy.deepcopy(source.definition)
    joiner = Joiner(function, definition, attributes, opens=opens)
    if _rebinds(definition, joiner.self_name) or not joiner.join(definition):
        return None
    joined = compiled(source._replace(definition=ast.fix_missing_locations(definition)), code)
    fused = FunctionType(joined, function.__globals__, function.__name__, function.__defaults__)
    fused.__kwdefaults__ = function.__kwdefaults__
    return fused, joiner.found


@cache
def _readable(function: FunctionType, code: CodeType) -> Source | None:
    """Return the source of ``function`` while its code is ``code``; None if it has none, or another runs."""
    source = source_of(function)
    return source if source is not None and is_what_runs(source, function) else None


def _rebinds(definition: ast.FunctionDef, self_name: str) -> bool:
    """Return whether ``self_name``, the first argument, is also bound elsewhere in the method."""
    stored = (each for each in ast.walk(definition) if isinstance(each, ast.Name) and each.id == self_name)
    named = sum(isinstance(each, ast.arg) and each.arg == self_name for each in ast.walk(definition))
    return named > 1 or any(not isinstance(each.ctx, ast.Load) for each in stored)
