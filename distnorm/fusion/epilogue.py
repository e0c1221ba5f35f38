"""Fuse norms with what follows them: find it in the model's own code, and run that code in a version with tails.

A module that owns a norm and calls it (``out = self.relu(self.bn(out) + x)``, or a ``Sequential`` with a ReLU behind a
norm) is given a class of its own, in whose methods the norm is told to do the rest (``fused_classes.py``). The methods
as they are run in evaluation, inside ``torch.compile``, which fuses by itself, and as long as a norm or a ReLU has
hooks or is another than it was. Norms keep their places, so collectives have one order whichever version runs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise
from types import CodeType, FunctionType

from torch import nn

from distnorm.fusion.ast import Attributes
from distnorm.fusion.fused_classes import Fused, find, fused_class, is_norm, is_relu
from distnorm.layers.class_swap import swap, underlying
from distnorm.layers.module import DistNorm

logger = logging.getLogger("distnorm")


def fuse(model: nn.Module) -> int:
    """Give the modules of ``model`` that own converted norms versions with tails; log which, and return how many.

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
        if isinstance(module, Fused):
            swap(module, underlying(module).__bases__[-1])
        if isinstance(module, DistNorm):
            vars(module).pop("tail", None)


def _install(module: nn.Module) -> None:
    base = underlying(module)
    found = _in_sequence(module) if base.forward is nn.Sequential.forward else _in_methods(module, base)
    found = [each for each in found if each[0] not in vars(module)]  # what a tool or a user put there comes first
    if not found:
        return
    swap(module, fused_class(base, tuple((name, attributes) for name, attributes, _ in found)))
    for _, _, tails in found:
        for norm, tail in tails.items():
            child = module._modules[norm]
            assert isinstance(child, DistNorm)
            child.tail = tail


_Finds = list[tuple[str, Attributes, dict[str, str]]]
"""Names of methods, what their versions rest on, and the tails of norms."""


def _in_sequence(module: nn.Module) -> _Finds:
    pairs = pairwise(module._modules.items())
    tails = {norm: "relu" for (norm, a), (_, b) in pairs if is_norm(a) and is_relu(b)}
    return [("forward", Attributes(), tails)] if tails else []


def _in_methods(module: nn.Module, base: type[nn.Module]) -> _Finds:
    children = {name: child for name, child in module._modules.items() if getattr(module, name) is child}
    attributes = Attributes(
        norms=frozenset(name for name, child in children.items() if is_norm(child)),
        relus=frozenset(name for name, child in children.items() if is_relu(child)),
        absent=frozenset(name for name, value in (*vars(module).items(), *module._modules.items()) if value is None),
    )
    found: _Finds = []
    for name, function in _methods(base):
        if attributes.norms & set(_names(function)):
            plan = find(base, name, attributes).found
            if plan.tails:
                rests_on = Attributes(frozenset(plan.tails), frozenset(plan.relus), frozenset(plan.absent))
                found.append((name, rests_on, plan.tails))
    return found


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
