"""Fuse norms with their epilogues: find these in the model's code, and run a fused version of that code.

A module that owns a norm and calls it (``out = self.relu(self.bn(out) + x)``, or a ``Sequential`` with a ReLU after a
norm) gets a subclass of its class, whose methods let the norm compute the epilogue (``fused_classes.py``). The
original methods still run in evaluation, inside ``torch.compile``, which fuses by itself, and while a norm or a ReLU
has hooks or has been replaced. Both versions call norms in the same order, so the order of collectives is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise
from types import CodeType, FunctionType

from torch import nn

from distnorm.fusion.ast import Attributes
from distnorm.fusion.fused_classes import Fused, find, fused_class, is_norm, is_relu
from distnorm.layers.class_swap import hand_down, swap, underlying
from distnorm.layers.module import DistNorm

logger = logging.getLogger("distnorm")


def fuse(model: nn.Module) -> int:
    """Fuse the converted norms of ``model`` with their epilogues, and return how many were fused.

    The layers' ``repr`` and the log at level DEBUG show their epilogues.
    """
    release(model)
    for module in model.modules():
        if any(isinstance(child, DistNorm) for child in module.children()):
            _install(module)
    norms = {name: layer for name, layer in model.named_modules() if isinstance(layer, DistNorm)}
    fused = [f"{name} ({layer.epilogue})" for name, layer in norms.items() if layer.epilogue]
    logger.debug(
        "distnorm: %d of %d norms are fused with their epilogues: %s", len(fused), len(norms), ", ".join(fused)
    )
    return len(fused)


def release(model: nn.Module) -> None:
    """Undo ``fuse``."""
    for module in model.modules():
        if isinstance(module, Fused):
            fused = underlying(module)
            author = fused.__bases__[-1]
            swap(module, author)
            hand_down(fused, author)
        if isinstance(module, DistNorm):
            vars(module).pop("epilogue", None)


def _install(module: nn.Module) -> None:
    base = underlying(module)
    found = _in_sequence(module) if base.forward is nn.Sequential.forward else _in_methods(module, base)
    found = [each for each in found if each[0] not in vars(module)]  # a method in the instance's dict has precedence
    if not found:
        return
    swap(module, fused_class(base, tuple((name, attributes) for name, attributes, _ in found)))
    for _, _, epilogues in found:
        for norm, epilogue in epilogues.items():
            child = module._modules[norm]
            assert isinstance(child, DistNorm)
            child.epilogue = epilogue


_Fusions = list[tuple[str, Attributes, dict[str, str]]]
"""By method: its name, the attributes that its fused version depends on, and the epilogues of its norms."""


def _in_sequence(module: nn.Module) -> _Fusions:
    pairs = pairwise(module._modules.items())
    epilogues = {norm: "relu" for (norm, a), (_, b) in pairs if is_norm(a) and is_relu(b)}
    return [("forward", Attributes(), epilogues)] if epilogues else []


def _in_methods(module: nn.Module, base: type[nn.Module]) -> _Fusions:
    children = {name: child for name, child in module._modules.items() if getattr(module, name) is child}
    attributes = Attributes(
        norms=frozenset(name for name, child in children.items() if is_norm(child)),
        relus=frozenset(name for name, child in children.items() if is_relu(child)),
        absent=frozenset(name for name, value in (*vars(module).items(), *module._modules.items()) if value is None),
    )
    found: _Fusions = []
    for name, function in _methods(base):
        if attributes.norms & set(_names(function)):
            merged = find(base, name, attributes).found
            if merged.epilogues:
                required = Attributes(frozenset(merged.epilogues), frozenset(merged.relus), frozenset(merged.absent))
                found.append((name, required, merged.epilogues))
    return found


def _methods(cls: type[nn.Module]) -> Iterator[tuple[str, FunctionType]]:
    """Yield the methods of the model's own classes, below ``nn.Module``."""
    seen: set[str] = set()
    for each in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, value in vars(each).items():
            if name not in seen and isinstance(value, FunctionType):
                yield name, value
            seen.add(name)


def _names(function: FunctionType) -> Iterator[str]:
    """Yield the names that ``function`` and the functions nested in it use as attributes or globals."""
    waiting = [function.__code__]
    while waiting:
        code = waiting.pop()
        yield from code.co_names
        waiting += [each for each in code.co_consts if isinstance(each, CodeType)]
