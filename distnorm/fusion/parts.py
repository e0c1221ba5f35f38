"""Parts of the syntax tree of a method: the epilogue of a norm, the statement that has it, and what a block returns."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import NamedTuple

from distnorm.fusion.reading import Applied


# docs/decisions.md#addition-in-place-keeps-the-dtype
class EpilogueCode(NamedTuple):
    """The epilogue of a norm: what is added (by ``+=`` to the norm's output unless ``widen``), then an activation.

    ``widen`` is None if the norm's output is added to the other by ``+=``.
    """

    residual: ast.expr | None = None
    widen: bool | None = True
    activation: Applied | None = None

    def then(self, other: EpilogueCode) -> EpilogueCode | None:
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
        return options if self.widen else options | {"widen": ast.Constant(self.widen)}

    def __str__(self) -> str:
        """Describe the epilogue as the layer's repr shows it."""
        added = [] if self.residual is None else ["residual"]
        return ", ".join([*added, *([] if self.activation is None else [self.activation.name])])


class Follower(NamedTuple):
    """What a statement computes of a norm's output, and the name that it assigns that to; "" if it returns it."""

    epilogue: EpilogueCode
    target: str


def assigning(statement: ast.Assign, target: str) -> ast.stmt:
    """Return ``statement`` with another target; returning its value if that is empty."""
    if not target:
        return ast.copy_location(ast.Return(statement.value), statement)
    name = ast.copy_location(ast.Name(target, ast.Store()), statement.targets[0])
    return ast.copy_location(ast.Assign([name], statement.value), statement)


def returned(block: list[ast.stmt]) -> Iterator[ast.expr | None]:
    """Yield what ``block`` returns: in branches too, but None for each return in a loop, ``with``, ``try`` or so."""
    for statement in block:
        if isinstance(statement, ast.Return):
            yield statement.value
        elif isinstance(statement, ast.If):
            yield from returned(statement.body)
            yield from returned(statement.orelse)
        elif not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from (
                None for each in ast.walk(statement) if isinstance(each, ast.Return | ast.Yield | ast.YieldFrom)
            )


def always_returns(block: list[ast.stmt]) -> bool:
    """Return whether ``block`` never ends without a return or an error."""
    last = block[-1] if block else None
    if isinstance(last, ast.If):
        return always_returns(last.body) and always_returns(last.orelse)
    return isinstance(last, ast.Return | ast.Raise)
