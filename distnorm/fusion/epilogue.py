"""Fuse norms with their epilogues: find these in the model's code, and run a fused version of that code.

A module that owns a norm and calls it (``out = self.relu(self.bn(out) + x)``, or a ``Sequential`` with an activation
after a norm) gets a subclass of its class, whose methods let the norm compute the epilogue (``fused_classes.py``). The
original methods still run in evaluation, inside ``torch.compile``, which fuses by itself, and while a norm or a ReLU
has hooks or has been replaced. Both versions call norms in the same order, so the order of collectives is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import CodeType, FunctionType

from torch import nn

from distnorm.fusion.activations import activation_of, is_identity
from distnorm.fusion.fused_classes import Fused, are_norms, find, following, fused_class, is_norm
from distnorm.fusion.reading import Attributes
from distnorm.layers.class_swap import hand_down, swap, underlying
from distnorm.layers.module import DistNorm

logger = logging.getLogger("distnorm")


def fuse(model: nn.Module) -> int:
    """Fuse the converted norms of ``model`` with their epilogues, and return how many were fused.

    The layers' ``repr`` and the log at level DEBUG show their epilogues.
    """
    release(model)
    for module in model.modules():
        if any(isinstance(each, DistNorm) for child in module.children() for each in (child, *_in_list(child))):
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
            child = module.get_submodule(norm)
            assert isinstance(child, DistNorm)
            child.epilogue = epilogue


_Fusions = list[tuple[str, Attributes, dict[str, str]]]
"""By method: its name, the attributes that its fused version depends on, and the epilogues of its norms."""


def _in_sequence(module: nn.Module) -> _Fusions:
    children = list(module._modules.values())
    tails = ((name, following(children, at)[1]) for at, name in enumerate(module._modules))
    epilogues = {name: activation.name for name, activation in tails if activation is not None}
    return [("forward", Attributes(), epilogues)] if epilogues else []


def _in_methods(module: nn.Module, base: type[nn.Module]) -> _Fusions:
    children = {name: child for name, child in module._modules.items() if getattr(module, name) is child}
    attributes = Attributes(
        norms=frozenset(name for name, child in children.items() if is_norm(child)),
        lists=frozenset(name for name, child in children.items() if _in_list(child) and are_norms(child)),
        activations=frozenset((name, each.name) for name, child in children.items() if (each := activation_of(child))),
        identities=frozenset(name for name, child in children.items() if is_identity(child)),
        flags=frozenset(_flags(module)),
    )
    found: _Fusions = []
    for name, function in _methods(base):
        if (attributes.norms | attributes.lists) & set(_names(function)):
            merged = find(base, name, attributes).found
            if merged.epilogues:
                required = Attributes(
                    attributes.norms & merged.owners,
                    attributes.lists & merged.owners,
                    frozenset(merged.activations.items()),
                    frozenset(merged.identities),
                    frozenset(merged.flags.items()),
                )
                found.append((name, required, _by_norm(module, merged.epilogues)))
    return found


def _flags(module: nn.Module) -> Iterator[tuple[str, bool | None]]:
    for name, value in (*vars(module).items(), *module._modules.items()):
        if (value is None or value is True or value is False) and name != "training":
            yield name, value


def _in_list(child: nn.Module) -> list[nn.Module]:
    """Return the modules in ``child``, if it is a list."""
    return list(child) if type(child) is nn.ModuleList else []


def _by_norm(module: nn.Module, epilogues: dict[str, str]) -> dict[str, str]:
    """Return the epilogues by norm, where some are given for whole lists of norms."""
    found: dict[str, str] = {}
    for name, epilogue in epilogues.items():
        listed = _in_list(module.get_submodule(name))
        found |= {f"{name}.{i}": epilogue for i in range(len(listed))} if listed else {name: epilogue}
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
