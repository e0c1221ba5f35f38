"""Classes whose methods run in a version with tails while that is what the model's code says, else as they are.

A module that is fused has a class of its own, made on top of the one that its author wrote and called alike; alike
modules share it. So whatever copies a module, or makes classes on top of its class, takes the versions along, with
``self`` as given. The version with tails runs in training only, outside of ``torch.compile`` and of tracers, and as
long as class, norms and ReLUs are what it was made for. A ``forward`` in the module's ``__dict__`` comes before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, update_wrapper
from itertools import pairwise
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from distnorm.compat.dispatch_state import has_global_hooks
from distnorm.fusion import ast
from distnorm.fusion.ast import Attributes, Found
from distnorm.fusion.source import rewrite
from distnorm.layers.class_swap import swap, underlying
from distnorm.layers.module import DistNorm
from distnorm.layers.tracing import is_traced

Wanted = tuple[tuple[str, Attributes], ...]
"""Names of methods, and the attributes that their versions with tails rest on."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RELU_FORWARD = nn.ReLU.forward
_WANTED = "_wanted"


class Fused:
    """Mixed in before the class that the author wrote."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Classes that are made at run time are none of those that an author's class registers."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Classes that were made here cannot be pickled; they are made again."""
        reduced, cls = super().__reduce_ex__(protocol), type(self)
        if isinstance(reduced, str) or Fused not in cls.__bases__:
            return reduced
        make, args, *rest = reduced
        plain = cls.__bases__[-1]
        make, *args = (plain if each is cls else each for each in (make, *args))
        return _made, (vars(cls)[_WANTED], make, *args), *rest


# docs/decisions.md#fused-modules-have-their-own-class
def fused_class(base: type[nn.Module], wanted: Wanted) -> type[nn.Module]:
    """``base`` with a version of each method that is ``wanted``; the same class whenever it is asked for."""
    for cls in base.__subclasses__():
        if Fused in cls.__bases__ and vars(cls)[_WANTED] == wanted:
            return cls
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    cls = type(base.__name__, (Fused, base), {**names, _WANTED: wanted})
    for name, attributes in wanted:
        setattr(cls, name, _Method(cls, name, find(base, name, attributes)))
    return cls


def _made(wanted: Wanted, make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    module = make(*args)
    swap(module, fused_class(underlying(module), wanted))
    return module


class Plan(NamedTuple):
    """A method as it is, with tails, and what these rest on."""

    plain: Any  # a function, which as an attribute mypy would bind
    fused: Callable[..., Any]
    found: Found

    def holds(self, module: nn.Module) -> bool:
        """Whether ``module`` still is what the version with tails was made for."""
        return (
            all(is_norm(getattr(module, name, None)) for name in self.found.tails)
            and all(is_relu(getattr(module, name, None)) for name in self.found.relus)
            and all(getattr(module, name, module) is None for name in self.found.absent)
            and all(ast.is_relu(path, self.plain.__globals__) for path in self.found.functions)
        )


def find(cls: type[nn.Module], name: str, attributes: Attributes) -> Plan:
    """What to run for the method ``name`` of ``cls``, and when."""
    plain: FunctionType = getattr(cls, name)
    if plain is nn.Sequential.forward:
        return Plan(plain, _run_in_sequence, Found())
    return Plan(plain, *(rewrite(plain, attributes) or (plain, Found())))


class _Method:
    """The method ``name`` of a class that was made here: its version, as long as the author's is the one it is of."""

    def __init__(self, cls: type[nn.Module], name: str, plan: Plan) -> None:
        self._cls, self._name, self._plain = cls, name, plan.plain
        self._version = _in_place_of(plan.plain, partial(_run, plan))

    def __get__(self, module: nn.Module | None, owner: type[nn.Module] | None = None) -> Any:
        below = getattr(self._cls.__bases__[-1], self._name)
        if module is None:
            return self._version if below is self._plain else below
        if below is self._plain and not torch.compiler.is_compiling():
            return MethodType(self._version, module)
        return getattr(super(self._cls, module), self._name)


def _run(plan: Plan, module: Any, *args: Any, **kwargs: Any) -> Any:
    """The method, as the moment asks."""
    traced = any(map(is_traced, (*args, *kwargs.values())))
    fuses = module.training and not torch.compiler.is_compiling() and not traced and plan.holds(module)
    return (plan.fused if fuses else plan.plain)(module, *args, **kwargs)


def _in_place_of(plain: FunctionType, run: Callable[..., Any]) -> FunctionType:
    """A function that calls ``run``, and in all that can be read of it is ``plain``.

    Frameworks read which arguments a method takes; torch.fx reads its code, torch.jit.script its source and globals.
    """
    given, taken = [], []
    for each in inspect.signature(plain).parameters.values():
        taken.append(each.replace(annotation=each.empty, default=each.empty if each.default is each.empty else None))
        by_name = each.kind is each.KEYWORD_ONLY
        given.append(f"{each.name}={each.name}" if by_name else str(each).partition(":")[0].partition("=")[0])
    name = plain.__name__
    text = f"def _(_run):\n def {name}{inspect.Signature(taken)}: return _run({', '.join(given)})\n return {name}"
    made: dict[str, Any] = {}
    exec(text, plain.__globals__, made)
    version: FunctionType = made["_"](run)
    update_wrapper(version, plain)
    del version.__dict__["__wrapped__"]  # who unwraps a method shall find this one
    version.__defaults__, version.__kwdefaults__ = plain.__defaults__, plain.__kwdefaults__
    place = {each: getattr(plain.__code__, each) for each in ("co_filename", "co_firstlineno", "co_qualname")}
    version.__code__ = version.__code__.replace(**place)
    return version


def _run_in_sequence(module: nn.Sequential, input: Any) -> Any:
    """As ``nn.Sequential.forward``, with every ReLU behind a norm left to that."""
    done = None
    for child, follower in pairwise((*module, None)):
        if child is not done:
            joint = is_norm(child) and is_relu(follower)
            input = child(input, relu=True) if joint else child(input)
            done = follower if joint else None
    return input


def is_norm(child: object) -> bool:
    """Whether ``child`` is a norm that can be told what to do, and nobody looks at what it returns."""
    return isinstance(child, DistNorm) and type(child).forward is DistNorm.forward and _is_unobserved(child)


def is_relu(child: object) -> bool:
    """Whether ``child`` is torch's ReLU, and nobody looks at what it is given."""
    return type(child) is nn.ReLU and nn.ReLU.forward is _RELU_FORWARD and _is_unobserved(child)


def _is_unobserved(child: nn.Module) -> bool:
    hooked = any(getattr(child, name) for name in _HOOKS) or has_global_hooks()
    return "forward" not in vars(child) and not hooked
