"""Layers of other packages whose code applies one function of torch to their input, or returns it as it is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from distnorm.compat.source_code import is_what_runs, source_of
from distnorm.kernels.activations import ACTIVATIONS

_BY_FUNCTION: dict[int, list[str]] = {}
"""By the ``id`` of a function of torch, the activations that it computes."""
for _name, _row in ACTIVATIONS.items():
    for _each in _row.functions:
        _BY_FUNCTION.setdefault(id(_each), []).append(_name)
_LONGEST = 120
"""Bytes of code of a method that is worth reading."""


class _Body(NamedTuple):
    """What a ``forward`` does: the function, by the names in the code, and its option ``approximate``."""

    code: CodeType
    of_self: bool
    path: tuple[str, ...]
    approximate: str


def applied_by(child: nn.Module) -> str | None:
    """Return which activation without parameters the code of ``child`` applies, "" if none at all; else None."""
    cls = type(child)
    forward = cls.forward
    body = _read(forward) if not child._modules and may_be_read(cls) else None
    if body is None or body.code is not forward.__code__:
        return None
    if not body.path:
        return ""
    names = list(functions_at(body.path, vars(child) if body.of_self else forward.__globals__))
    name = {"none": "gelu", "tanh": "gelu_tanh"}.get(body.approximate) if "gelu" in names else next(iter(names), None)
    return name if name is not None and not ACTIVATIONS[name].option else None


def may_be_read(cls: type[nn.Module]) -> bool:
    """Return whether layers of the class ``cls`` may be of this kind: not torch's own, and with a short ``forward``."""
    if cls.__module__.startswith("torch.") or not isinstance(cls.forward, FunctionType):
        return False
    code = cls.forward.__code__
    return code.co_argcount == len(code.co_varnames) == 2 and len(code.co_code) <= _LONGEST


@cache
def _read(forward: FunctionType) -> _Body | None:
    code = forward.__code__
    source = source_of(forward)
    if source is None or not is_what_runs(source, forward):
        return None
    owner, given = code.co_varnames
    statement = source.definition.body[-1]
    before = source.definition.body[:-1]
    value = statement.value if isinstance(statement, ast.Return) else None
    if any(not isinstance(each, ast.Expr) or not isinstance(each.value, ast.Constant) for each in before):
        return None  # more than a docstring
    if isinstance(value, ast.Call):
        path, options = tuple(_path(value.func)), {each.arg: each.value for each in value.keywords}
        approximate = options.pop("approximate", ast.Constant("none"))
        if not path or not set(options) <= {"inplace"} or not isinstance(approximate, ast.Constant):
            return None
        if not _is_named(value.args, given) or given in path:
            return None
        of_self = path[0] == owner
        return _Body(code, of_self, path[1:] if of_self else path, str(approximate.value))
    return _Body(code, False, (), "") if value is not None and _is_named([value], given) else None


def _is_named(nodes: list[ast.expr], name: str) -> bool:
    return len(nodes) == 1 and isinstance(nodes[0], ast.Name) and nodes[0].id == name


def _path(node: ast.expr) -> Iterator[str]:
    """Yield a name with attributes, such as ``("F", "relu")``; nothing for other expressions."""
    if isinstance(node, ast.Name):
        yield node.id
    elif isinstance(node, ast.Attribute) and (owner := list(_path(node.value))):
        yield from (*owner, node.attr)


def functions_at(path: tuple[str, ...], names: dict[str, Any]) -> Iterator[str]:
    """Yield the activations of the function that ``path`` refers to: a name in ``names``, and attributes of modules."""
    value = names.get(path[0]) if path else None
    for name in path[1:]:
        value = getattr(value, name, None) if isinstance(value, ModuleType) else None
    yield from _BY_FUNCTION.get(id(value), ())
