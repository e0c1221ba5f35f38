"""Recognize in the syntax tree of a method what is known of its module: norms, activations and conditions."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, NamedTuple

from distnorm.fusion.names import Names
from distnorm.kernels.activations import ACTIVATIONS
from distnorm.layers.one_function import functions_at


class Attributes(NamedTuple):
    """What is known of the attributes of ``self``, by name.

    Fields:
        norms: converted norms.
        lists: lists of converted norms.
        activations: layers of activations that norms can compute, with the names of the activations.
        identities: layers that return their input.
        flags: attributes that are True, False or None.
        endings: modules that end in a norm, which takes an epilogue from outside.
        quiet: layers that may as well run earlier or later.
        present: modules of any kind.
    """

    norms: frozenset[str] = frozenset()
    lists: frozenset[str] = frozenset()
    activations: frozenset[tuple[str, str]] = frozenset()
    identities: frozenset[str] = frozenset()
    flags: frozenset[tuple[str, bool | None]] = frozenset()
    endings: frozenset[str] = frozenset()
    quiet: frozenset[str] = frozenset()
    present: frozenset[str] = frozenset()


@dataclass
class Found:
    """The norms that were merged with epilogues, and the attributes and functions that this depends on."""

    epilogues: dict[str, str] = field(default_factory=dict)
    """By norm, its epilogue in words. Norms of a list are called by its name, with the index if that is a constant."""
    activations: dict[str, str] = field(default_factory=dict)
    identities: set[str] = field(default_factory=set)
    flags: dict[str, bool | None] = field(default_factory=dict)
    functions: dict[tuple[str, ...], str] = field(default_factory=dict)
    """The names by which the code calls functions, such as ``("F", "relu")``, and the activations they compute."""
    last: set[str] = field(default_factory=set)
    """Norms, named as above, that take the epilogue that the method is called with."""
    fresh: set[str] = field(default_factory=set)
    """Norms, named as above, whose output the method adds something to, and nobody else may hold."""
    quiet: set[str] = field(default_factory=set)
    present: set[str] = field(default_factory=set)

    @property
    def owners(self) -> set[str]:
        """Return the names of the norms, lists of norms and modules that end in a norm."""
        return {name.partition(".")[0] for name in (*self.epilogues, *self.last, *self.fresh)}

    def required(self, attributes: Attributes) -> Attributes:
        """Return those of ``attributes`` that this depends on."""
        return Attributes(
            attributes.norms & self.owners,
            attributes.lists & self.owners,
            frozenset(self.activations.items()),
            frozenset(self.identities),
            frozenset(self.flags.items()),
            attributes.endings & self.owners,
            frozenset(self.quiet),
            frozenset(self.present),
        )


class Applied(NamedTuple):
    """An activation in the code: its name, an expression for its parameter, and of what it is computed."""

    name: str
    parameter: ast.expr | None
    argument: ast.expr


class Reader:
    """Recognizes expressions of one method, and notes in ``found`` what this depends on."""

    def __init__(self, function: FunctionType, definition: ast.FunctionDef, attributes: Attributes) -> None:
        self.self_name = function.__code__.co_varnames[0]
        self.found = Found()
        self.names = Names(function, definition)
        stores = (each for each in ast.walk(definition) if not isinstance(_context(each), ast.Load))
        self._aliases: dict[str, str] = {}
        changed = {self.self_attribute(each) for each in stores}
        self._norms, self._lists = attributes.norms - changed, attributes.lists - changed
        self._endings, self._quiet = attributes.endings - changed, attributes.quiet - changed
        self._identities, self._present = attributes.identities - changed, attributes.present - changed
        self._activations = {name: found for name, found in attributes.activations if name not in changed}
        self._flags = {name: value for name, value in attributes.flags if name not in changed}
        self._globals = function.__globals__
        self._aliases |= self._read_aliases(definition)

    def _read_aliases(self, definition: ast.FunctionDef) -> dict[str, str]:
        """Return by name of a variable, bound once, the attribute of ``self`` that it holds."""
        nodes = list(ast.walk(definition))
        bound = [each.id for each in nodes if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load)]
        bound += [getattr(each, name, "") for each in nodes for name in ("arg", "name", "asname", "rest")]
        found = {}
        for each in nodes:
            name, attribute = assigned(each), self.held_attribute(each)
            if name is not None and attribute is not None and bound.count(name) == 1 and self.names.is_private(name):
                found[name] = attribute
        return found

    def held_attribute(self, node: ast.AST) -> str | None:
        """Return the attribute in ``name = self.attribute`` or ``name = getattr(self, "attribute", default)``."""
        value = node.value if isinstance(node, ast.Assign) else None
        if isinstance(value, ast.Call) and self._path(value.func) == ("getattr",) and not value.keywords:
            match value.args:
                case [ast.Name(id=owner), ast.Constant(value=str(name)), *_] if owner == self.self_name:
                    known = name in self._flags or name in self._present
                    return name if known and "getattr" not in self._globals else None
        return self.self_attribute(value) if isinstance(value, ast.Attribute) else None

    def self_attribute(self, node: ast.AST | None) -> str | None:
        """Return the name in ``self.name``, or in that of a variable that holds it; or None."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.self_name:
            return node.attr
        return self._aliases.get(node.id) if isinstance(node, ast.Name) else None

    def norm(self, node: ast.expr) -> str | None:
        """Return the name of the norm that is ``self.name`` or ``self.names[index]``, or None."""
        name = self.self_attribute(node)
        if name in self._norms or name in self._endings:
            return name
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Name | ast.Constant):
            name, index = self.self_attribute(node.value), node.slice
            if name in self._lists:
                number = index.value if isinstance(index, ast.Constant) else None
                return f"{name}.{number}" if type(number) is int else name
        return None

    def ends_in_norm(self, node: ast.expr) -> bool:
        """Return whether ``node`` is no norm, but a module that ends in one."""
        return self.self_attribute(node) in self._endings

    def without_identities(self, node: ast.expr) -> ast.expr:
        """Return what ``node`` is without calls of layers that return their input."""
        argument = self.argument_of_identity(node)
        return node if argument is None else self.without_identities(argument)

    def is_quiet(self, node: ast.expr, *, layers: bool) -> bool:
        """Return whether evaluating ``node`` before a norm rather than after it changes nothing.

        ``layers``: whether calls of layers without side effects count.
        """
        if isinstance(node, ast.Name):
            return layers or self.names.is_private(node.id)
        name = self.self_attribute(node.func) if isinstance(node, ast.Call) else None
        if layers and name in self._quiet and isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
            self.found.quiet.add(str(name))
            return self.is_quiet(node.args[0], layers=True)
        return isinstance(node, ast.Constant)

    def argument_of_identity(self, node: ast.AST) -> ast.expr | None:
        """Return the x in ``self.name(x)`` of a layer that returns its input, or None."""
        name = self.self_attribute(node.func) if isinstance(node, ast.Call) else None
        if name is None or name not in self._identities or not isinstance(node, ast.Call):
            return None
        if node.keywords or len(node.args) != 1 or isinstance(node.args[0], ast.Starred):
            return None
        self.found.identities.add(name)
        return node.args[0]

    def activation(self, node: ast.AST) -> Applied | None:
        """Return the activation that ``node`` calls, in any spelling."""
        if not isinstance(node, ast.Call) or any(isinstance(each, ast.Starred) for each in node.args):
            return None
        path = self._path(node.func)
        names = list(functions_at(path, self._globals))
        if names:
            found = _with_options(names, node)
            if found is not None:
                self.found.functions[path] = names[0]
            return found
        owner = self.self_attribute(node.func)
        if node.keywords or len(node.args) > 1:
            return None
        if owner is not None and owner in self._activations and node.args:
            self.found.activations[owner] = name = self._activations[owner]
            option = ACTIVATIONS[name].option
            parameter = ast.Attribute(node.func, option, ast.Load()) if option else None
            return Applied(name, parameter, node.args[0])
        if owner is None and isinstance(node.func, ast.Attribute) and not node.args:
            for name, row in ACTIVATIONS.items():
                if node.func.attr in row.methods:
                    return Applied(name, None, node.func.value)
        return None

    def _path(self, node: ast.AST) -> tuple[str, ...]:
        """Return a global name with attributes, such as ``("F", "relu")``, or an empty tuple."""
        if isinstance(node, ast.Name) and node.id not in self.names.bound:
            return (node.id,)
        owner = self._path(node.value) if isinstance(node, ast.Attribute) else ()
        return (*owner, node.attr) if isinstance(node, ast.Attribute) and owner else ()

    def branch(self, node: ast.stmt) -> list[ast.stmt] | None:
        """Return the branch that ``node``, an ``if``, takes, if what is known of ``self`` decides that."""
        truth = self._truth(node.test) if isinstance(node, ast.If) else None
        if truth is None or not isinstance(node, ast.If):
            return None
        return node.body if truth else node.orelse

    def side(self, node: ast.IfExp) -> ast.expr:
        """Return the side that ``node`` takes, if that is known and it calls a norm or an activation; else ``node``."""
        truth = self._truth(node.test) if self.touches(node) else None
        return node if truth is None else node.body if truth else node.orelse

    def _truth(self, test: ast.expr) -> bool | None:
        """Return whether ``self.name``, ``not self.name``, ``self.name is None`` or ``is not None`` holds."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            truth = self._truth(test.operand)
            return None if truth is None else not truth
        if not isinstance(test, ast.Compare):
            name = self.self_attribute(test)
            return None if name is None else self._holds(name, none=False, otherwise=None)
        name, operator, right = self.self_attribute(test.left), test.ops[0], test.comparators[0]
        against_none = isinstance(right, ast.Constant) and right.value is None and len(test.ops) == 1
        if name is None or not against_none or not isinstance(operator, ast.Is | ast.IsNot):
            return None
        is_not = isinstance(operator, ast.IsNot)
        return self._holds(name, none=not is_not, otherwise=is_not)

    def _holds(self, name: str, *, none: bool, otherwise: bool | None) -> bool | None:
        """Return ``none`` if ``self.name`` is None, ``otherwise`` (by default its truth) if it is not."""
        if name in self._flags:
            value = self.found.flags[name] = self._flags[name]
            return none if value is None else value if otherwise is None else otherwise
        if name in self._activations:
            self.found.activations[name] = self._activations[name]
            return True if otherwise is None else otherwise
        if name in self._present and otherwise is not None:  # its truth may be its length
            self.found.present.add(name)
            return otherwise
        return None

    def touches(self, node: ast.AST) -> bool:
        """Return whether ``node`` calls a norm or an activation, adds, or returns."""
        return any(isinstance(each, ast.Return | ast.Add) or self._concerns(each) for each in ast.walk(node))

    def _concerns(self, node: ast.AST) -> bool:
        called = isinstance(node, ast.Call) and self.norm(node.func) is not None
        return called or self.activation(node) is not None


def _with_options(names: list[str], node: ast.Call) -> Applied | None:
    """Return the activation of a call of a function that computes the first of ``names``, or with an option another."""
    option = ACTIVATIONS[names[0]].option
    given = {each.arg or "": each.value for each in node.keywords}
    given |= dict(zip([option, "inplace"] if option else ["inplace"], node.args[1:], strict=False))
    approximate = given.pop("approximate", ast.Constant("none"))
    positional = 2 + bool(option)
    known = set(given) <= {option, "inplace"} - {""} and 0 < len(node.args) <= positional
    if not known or not all(_is_constant(each) for each in (*given.values(), approximate)):
        return None
    name = names[0]
    if isinstance(approximate, ast.Constant) and approximate.value != "none":
        name = "gelu_tanh" if "gelu_tanh" in names and approximate.value == "tanh" else ""
    parameter = given.get(option, ast.Constant(ACTIVATIONS[names[0]].default)) if option else None
    return Applied(name, parameter, node.args[0]) if name else None


def _is_constant(node: ast.expr) -> bool:
    """Return whether ``node`` is a constant, or a negative number."""
    negative = isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
    return isinstance(node.operand if negative and isinstance(node, ast.UnaryOp) else node, ast.Constant)


def assigned(statement: ast.AST) -> str | None:
    """Return the name that ``statement`` assigns, if it is a single one."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        return target.id if isinstance(target, ast.Name) else None
    return None


def _context(node: ast.AST) -> Any:
    return node.ctx if isinstance(node, ast.Attribute) else ast.Load()
