"""Classes of fused modules: their methods run a fused version, or the original one where that does not apply.

A fused module has a subclass of the class that its author wrote, with the same name. Modules that are fused alike share
it. Copies of a module, and classes that tools derive from its class, therefore inherit the fused methods. The fused
version runs in training only, outside ``torch.compile`` and tracers, and only while class, norms and layers are those
that it was compiled for. A ``forward`` in the module's ``__dict__`` has precedence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial, update_wrapper
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from distnorm.fusion.activations import activation_of, functions_at, is_identity, is_unobserved
from distnorm.fusion.reading import Attributes, Found
from distnorm.fusion.source import rewrite
from distnorm.layers.class_swap import note_contents, swap, underlying
from distnorm.layers.module import DistNorm
from distnorm.layers.tracing import is_traced
from distnorm.types import RELU, Activation

Wanted = tuple[tuple[str, Attributes], ...]
"""Names of methods, and the attributes that their fused versions depend on."""

_WANTED = "_wanted"


class Fused:
    """Marks classes of fused modules. It is the first base, before the class that the author wrote."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Keep an ``__init_subclass__`` of the author's class, such as a registry, from seeing generated classes."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the author's class and what to fuse: generated classes cannot be pickled, so ``_made`` makes them."""
        reduced, cls = super().__reduce_ex__(protocol), type(self)
        if isinstance(reduced, str) or Fused not in cls.__bases__:
            return reduced
        make, args, *rest = reduced
        plain = cls.__bases__[-1]
        make, *args = (plain if each is cls else each for each in (make, *args))
        return _made, (vars(cls)[_WANTED], make, *args), *rest


# docs/decisions.md#fused-modules-have-their-own-class
def fused_class(base: type[nn.Module], wanted: Wanted) -> type[nn.Module]:
    """Return the subclass of ``base`` with fused versions of the methods in ``wanted``; equal calls share one class."""
    for cls in base.__subclasses__():
        if Fused in cls.__bases__ and vars(cls)[_WANTED] == wanted:
            return cls
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    cls = type(base.__name__, (Fused, base), {**names, _WANTED: wanted})
    for name, attributes in wanted:
        setattr(cls, name, _FusedMethod(cls, name, find(base, name, attributes)))
    note_contents(cls)
    return cls


def _made(wanted: Wanted, make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    """Rebuild a pickled module. Pickles hold the name of this function, so it must not change."""
    module = make(*args)
    swap(module, fused_class(underlying(module), wanted))
    return module


class Plan(NamedTuple):
    """The original and the fused version of a method, and what the latter depends on."""

    plain: Any  # a function; mypy would take an attribute of that type for a bound method
    fused: Callable[..., Any]
    found: Found

    def is_valid_for(self, module: nn.Module) -> bool:
        """Return whether what ``module`` has is still what the fused version was compiled for."""
        found, names = self.found, self.plain.__globals__
        return (
            all(are_norms(getattr(module, name, None)) for name in found.owners)
            and all(_is_called(getattr(module, name, None), each) for name, each in found.activations.items())
            and all(is_identity(getattr(module, name, None)) for name in found.identities)
            and all(getattr(module, name, module) is value for name, value in found.flags.items())
            and all(next(functions_at(path, names), None) == each for path, each in found.functions.items())
        )


def find(cls: type[nn.Module], name: str, attributes: Attributes) -> Plan:
    """Return both versions of the method ``name`` of ``cls``."""
    plain: FunctionType = getattr(cls, name)
    if plain is nn.Sequential.forward:
        return Plan(plain, _run_in_sequence, Found())
    return Plan(plain, *(rewrite(plain, attributes) or (plain, Found())))


class _FusedMethod:
    """Descriptor of the method ``name`` of a generated class: fused, unless the author's method has been replaced."""

    def __init__(self, cls: type[nn.Module], name: str, plan: Plan) -> None:
        self._cls, self._name, self._plain = cls, name, plan.plain
        self._code = plan.plain.__code__  # tools that reload code put new code into the old function
        self._version = _with_signature_of(plan.plain, partial(_run, plan))

    def __get__(self, module: nn.Module | None, owner: type[nn.Module] | None = None) -> Any:
        below = getattr(self._cls.__bases__[-1], self._name)
        as_read = below is self._plain and below.__code__ is self._code
        if module is None:
            return self._version if as_read else below
        if as_read and not torch.compiler.is_compiling():
            return MethodType(self._version, module)
        return getattr(super(self._cls, module), self._name)


def _run(plan: Plan, module: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the fused version if it applies, else the original one."""
    traced = any(map(is_traced, (*args, *kwargs.values())))
    fuses = module.training and not torch.compiler.is_compiling() and not traced and plan.is_valid_for(module)
    return (plan.fused if fuses else plan.plain)(module, *args, **kwargs)


def _with_signature_of(plain: FunctionType, run: Callable[..., Any]) -> FunctionType:
    """Return a function that calls ``run`` and has the signature, name, code location and globals of ``plain``.

    Frameworks inspect a method's signature, torch.fx its code, torch.jit.script its source and globals.
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
    del version.__dict__["__wrapped__"]  # inspect.unwrap must return this function
    version.__defaults__, version.__kwdefaults__ = plain.__defaults__, plain.__kwdefaults__
    place = {each: getattr(plain.__code__, each) for each in ("co_filename", "co_firstlineno", "co_qualname")}
    version.__code__ = version.__code__.replace(**place)
    return version


def _run_in_sequence(module: nn.Sequential, input: Any) -> Any:
    """Run as ``nn.Sequential.forward``, but let norms compute the activation that follows them."""
    children = list(module)
    at = 0
    while at < len(children):
        follower, activation = following(children, at)
        if activation is None:
            input, follower = children[at](input), at + 1
        else:
            input = _call(children[at], input, activation)
        at = follower
    return input


def _call(norm: nn.Module, input: Any, activation: Activation) -> Any:
    if activation == RELU:
        return norm(input, relu=True)
    return norm(input, activation=activation.name, parameter=activation.parameter)


def following(children: Sequence[nn.Module | None], at: int) -> tuple[int, Activation | None]:
    """Return the activation that follows a norm at ``at``, also behind layers that do nothing, and the place behind it.

    None if there is no norm or no such activation.
    """
    if not is_norm(children[at]):
        return at, None
    after = next((i for i in range(at + 1, len(children)) if not is_identity(children[i])), at)
    return after + 1, activation_of(children[after])


def are_norms(child: object) -> bool:
    """Return whether ``child`` is a norm as in ``is_norm``, or a list of such norms."""
    return all(map(is_norm, child)) if type(child) is nn.ModuleList else is_norm(child)


def _is_called(child: object, activation: str) -> bool:
    found = activation_of(child)
    return found is not None and found.name == activation


def is_norm(child: object) -> bool:
    """Return whether ``child`` is a converted norm that can compute an epilogue, and has no hooks."""
    return isinstance(child, DistNorm) and type(child).forward is DistNorm.forward and is_unobserved(child)
