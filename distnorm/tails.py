"""Fuse norms with what follows them: find it in the model's own code, and run that code in a version with tails.

A module that owns a norm and calls it (``out = self.relu(self.bn(out) + x)``, or a ``Sequential`` with a ReLU behind a
norm) is given a ``forward`` of its own, in which the norm is told to do the rest. The version without tails runs in
evaluation, inside ``torch.compile``, which fuses by itself, and as long as a norm or a ReLU has hooks or is another
than it was. Norms keep their places, so collectives have one order whichever version runs.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from distnorm.joining import Attributes, Found
from distnorm.module import DistNorm
from distnorm.rewriting import rewrite

logger = logging.getLogger("distnorm")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fuse(model: nn.Module) -> int:
    """Give the modules of ``model`` that own converted norms a version with tails; log which, and return how many.

    The layers' ``repr`` says what became of each.
    """
    release(model)
    for module in model.modules():
        if any(isinstance(child, DistNorm) for child in module.children()):
            _install(module)
    norms = {name: layer for name, layer in model.named_modules() if isinstance(layer, DistNorm)}
    fused = [f"{name} ({layer.tail})" for name, layer in norms.items() if layer.tail]
    logger.info("distnorm: %d of %d norms are fused with what follows: %s", len(fused), len(norms), ", ".join(fused))
    return len(fused)


def release(model: nn.Module) -> None:
    """Undo ``fuse``."""
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if isinstance(value, Version)]:
            del module.__dict__[name]
        if isinstance(module, DistNorm):
            vars(module).pop("tail", None)


class Version:
    """A method of one module, with tails or without, as the moment asks; in the place of the method.

    Copies and pickles of the module take it along.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        """The method ``name`` of ``module``."""
        self._module, self._name = module, name
        self._plan: _Plan | None = None

    @property
    def __signature__(self) -> inspect.Signature:
        """The method's own: frameworks read from it what a model takes."""
        return inspect.signature(getattr(type(self._module), self._name).__get__(self._module))

    def __reduce__(self) -> tuple[Any, ...]:
        """Functions that were made here cannot be pickled; they are made again."""
        return Version, (self._module, self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method."""
        module = self._module
        if not module.training or torch.compiler.is_compiling():
            return getattr(type(module), self._name)(module, *args, **kwargs)
        plan = self.plan
        return (plan.fused if plan.holds(module) else plan.plain)(module, *args, **kwargs)

    @property
    def plan(self) -> _Plan:
        """What to run, and when."""
        if self._plan is None:
            self._plan = _plan(self._module, self._name)
        return self._plan


class _Plan(NamedTuple):
    plain: Callable[..., Any]
    fused: Callable[..., Any]
    found: Found

    def holds(self, module: nn.Module) -> bool:
        """Whether ``module`` still is what the version with tails was made for."""
        children = module._modules
        return (
            all(_is_norm(children.get(name)) for name in self.found.tails)
            and all(_is_relu(children.get(name)) for name in self.found.relus)
            and all(getattr(module, name) is None for name in self.found.absent)
        )


def _install(module: nn.Module) -> None:
    if type(module).forward is nn.Sequential.forward:
        names = ["forward"]
    else:
        owned = {name for name, child in module._modules.items() if isinstance(child, DistNorm)}
        names = [name for name, function in _methods(type(module)) if owned & set(_names(function))]
    for name in names:
        version = Version(module, name)
        if name not in vars(module) and version.plan.found.tails:
            module.__dict__[name] = version
            for norm, tail in version.plan.found.tails.items():
                child = module._modules[norm]
                assert isinstance(child, DistNorm)
                child.tail = tail


def _plan(module: nn.Module, name: str) -> _Plan:
    plain = getattr(type(module), name)
    if plain is nn.Sequential.forward:
        pairs = pairwise(module._modules.items())
        return _Plan(plain, _run_in_sequence, Found({norm: "relu" for (norm, a), (_, b) in pairs if _is_pair(a, b)}))
    children = {name: child for name, child in module._modules.items() if getattr(module, name) is child}
    attributes = Attributes(
        norms=frozenset(name for name, child in children.items() if _is_norm(child)),
        relus=frozenset(name for name, child in children.items() if _is_relu(child)),
        absent=frozenset(name for name, value in (*vars(module).items(), *module._modules.items()) if value is None),
    )
    fused, found = rewrite(plain, attributes) or (plain, Found())
    return _Plan(plain, fused, found)


def _run_in_sequence(module: nn.Sequential, input: Any) -> Any:
    """As ``nn.Sequential.forward``, with every ReLU behind a norm left to that."""
    done = None
    for child, follower in pairwise((*module, None)):
        if child is not done:
            joint = _is_pair(child, follower)
            input = child(input, relu=True) if joint else child(input)
            done = follower if joint else None
    return input


def _methods(cls: type[nn.Module]) -> Iterator[tuple[str, FunctionType]]:
    """The methods that a model's author wrote."""
    seen: set[str] = set()
    for each in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, value in vars(each).items():
            if name not in seen and isinstance(value, FunctionType):
                yield name, value
            seen.add(name)


def _names(function: FunctionType) -> Iterator[str]:
    """The attributes that ``function`` reads, and functions inside of it."""
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        yield from code.co_names
        waiting += [each for each in code.co_consts if isinstance(each, CodeType)]


def _is_pair(norm: nn.Module | None, relu: nn.Module | None) -> bool:
    return _is_norm(norm) and _is_relu(relu)


def _is_norm(child: nn.Module | None) -> bool:
    """Whether ``child`` is a norm that can be told what to do, and nobody looks at what it returns."""
    return isinstance(child, DistNorm) and type(child).forward is DistNorm.forward and _is_unobserved(child)


def _is_relu(child: nn.Module | None) -> bool:
    return type(child) is nn.ReLU and _is_unobserved(child)


def _is_unobserved(child: nn.Module) -> bool:
    return "forward" not in vars(child) and not any(getattr(child, name) for name in _HOOKS)
