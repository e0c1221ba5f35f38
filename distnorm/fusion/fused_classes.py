"""Classes of fused modules: their methods run a fused version, or the original one where that does not apply.

A fused module has a subclass of the class that its author wrote, with the same name. Modules that are fused alike share
it. Copies of a module, and classes that tools derive from its class, therefore inherit the fused methods. The fused
version runs in training only, outside ``torch.compile`` and tracers, and only while class, norms and layers are those
that it was compiled for. A ``forward`` in the module's ``__dict__`` has precedence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, update_wrapper
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from distnorm.fusion.ast import FORWARD
from distnorm.fusion.plans import Ending, Plan, find
from distnorm.fusion.reading import Attributes
from distnorm.layers.class_swap import note_contents, swap, underlying
from distnorm.layers.tracing import is_traced

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
        if name != FORWARD:
            setattr(cls, name, _FusedMethod(cls, name, find(base, name, attributes)))
    for name, attributes in wanted:
        if name == FORWARD:
            setattr(cls, name, Ending(cls, find(base, name, attributes)))
    note_contents(cls)
    return cls


def _made(wanted: Wanted, make: Callable[..., nn.Module], *args: Any) -> nn.Module:
    """Rebuild a pickled module. Pickles hold the name of this function, so it must not change."""
    module = make(*args)
    swap(module, fused_class(underlying(module), wanted))
    return module


class _FusedMethod:
    """Descriptor of the method ``name`` of a generated class: fused, unless the author's method has been replaced."""

    def __init__(self, cls: type[nn.Module], name: str, plan: Plan) -> None:
        self._cls, self._name = cls, name
        self._plain: FunctionType = plan.plain
        self._code = plan.plain.__code__  # tools that reload code put new code into the old function
        self._version = _with_signature_of(plan.plain, partial(_applies, plan), plan.fused)

    def __get__(self, module: nn.Module | None, owner: type[nn.Module] | None = None) -> Any:
        below = getattr(self._cls.__bases__[-1], self._name)
        as_read = below is self._plain and below.__code__ is self._code
        if module is None:
            return self._version if as_read else below
        if as_read and not torch.compiler.is_compiling():
            return MethodType(self._version, module)
        return getattr(super(self._cls, module), self._name)


def _applies(plan: Plan, module: Any, /, *args: Any, **kwargs: Any) -> bool:
    """Return whether a call with these arguments runs the fused version."""
    if not module.training or torch.compiler.is_compiling() or plan.saves_nothing(module, args):
        return False
    for each in args:
        if is_traced(each):
            return False
    return plan.is_valid_for(module) and not (kwargs and any(map(is_traced, kwargs.values())))


def _with_signature_of(plain: FunctionType, applies: Callable[..., bool], fused: Callable[..., Any]) -> FunctionType:
    """Return a function that calls ``fused`` if it ``applies``, and ``plain`` otherwise, with the same arguments.

    It has the signature, name, code location and globals of ``plain``.

    Frameworks inspect a method's signature, torch.fx its code, torch.jit.script its source and globals.
    """
    given, taken = [], []
    for each in inspect.signature(plain).parameters.values():
        taken.append(each.replace(annotation=each.empty, default=each.empty if each.default is each.empty else None))
        by_name = each.kind is each.KEYWORD_ONLY
        given.append(f"{each.name}={each.name}" if by_name else str(each).partition(":")[0].partition("=")[0])
    name = plain.__name__
    call = f"({', '.join(given)})"
    # Under names that no parameter has.
    ours = "_distnorm_applies", "_distnorm_fused", "_distnorm_plain"
    body = f"return ({ours[1]} if {ours[0]}{call} else {ours[2]}){call}"
    text = f"def _({', '.join(ours)}):\n def {name}{inspect.Signature(taken)}: {body}\n return {name}"
    made: dict[str, Any] = {}
    exec(text, plain.__globals__, made)
    version: FunctionType = made["_"](applies, fused, plain)
    update_wrapper(version, plain)
    del version.__dict__["__wrapped__"]  # inspect.unwrap must return this function
    version.__defaults__, version.__kwdefaults__ = plain.__defaults__, plain.__kwdefaults__
    place = {each: getattr(plain.__code__, each) for each in ("co_filename", "co_firstlineno", "co_qualname")}
    version.__code__ = version.__code__.replace(**place)
    return version
