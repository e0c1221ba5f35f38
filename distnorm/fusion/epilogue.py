"""Fuse norms with their epilogues: find these in the model's code, and run a fused version of that code.

A module that owns a norm and calls it (``out = self.relu(self.bn(out) + x)``, or a ``Sequential`` with an activation
after a norm) gets a subclass of its class, whose methods let the norm compute the epilogue (``fused_classes.py``). So
does one that calls a module that ends in a norm (``x + self.body(x)``), and so does that module. The original methods
still run in evaluation, inside ``torch.compile``, which fuses by itself, and while a norm or an activation has hooks or
has been replaced. Both versions call norms in the same order, so the order of collectives is the same.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import NamedTuple

from torch import nn

from distnorm.compat.dispatch_state import is_unobserved
from distnorm.fusion.ast import FORWARD
from distnorm.fusion.fused_classes import Fused, fused_class
from distnorm.fusion.plans import find, following, is_norm, last
from distnorm.fusion.reading import Attributes
from distnorm.layers.activations import activation_of, has_no_effects, is_identity, is_sequence
from distnorm.layers.class_swap import hand_down, swap, underlying
from distnorm.layers.known_norms import Activated
from distnorm.layers.module import DistNorm

logger = logging.getLogger("distnorm")


def fuse(model: nn.Module) -> int:
    """Fuse the converted norms of ``model`` with their epilogues, and return how many were fused.

    The layers' ``repr`` and the log at level DEBUG show their epilogues.
    """
    release(model)
    _Fusing(model).install()
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


class _Method(NamedTuple):
    """A method with a fused version: its name, what that depends on, and by child the epilogue of its norm."""

    name: str
    required: Attributes
    epilogues: dict[str, str]
    last: frozenset[str] = frozenset()
    """Children whose output the method returns, if the epilogue is given from outside."""


class _Fusing:
    """What can be fused in ``model``, whose classes have not been swapped yet."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._endings: dict[nn.Module, _Method | None] = {}
        self._given: dict[nn.Module, _Method] = {}
        """The modules that are called with an epilogue, and the method for that."""

    def install(self) -> None:
        """Swap the classes of all modules that have a fused method, and tell the norms."""
        methods = {module: self._methods(module) for module in self._modules}
        for module, found in methods.items():
            for method in found:
                unchanged = dict.fromkeys(method.required.endings, "")  # what is asked for its norm only
                for name, epilogue in (unchanged | method.epilogues).items():
                    self._give(module.get_submodule(name), epilogue)
        for module, found in methods.items():
            wanted = [*found, self._given[module]] if module in self._given else found
            if wanted:
                swap(module, fused_class(underlying(module), tuple((each.name, each.required) for each in wanted)))
            if isinstance(module, Activated) and (activation := module.own_activation()) is not None:
                module.epilogue = activation.name

    def _give(self, child: nn.Module, epilogue: str) -> None:
        """Let ``child``, a list of norms, a norm or one that ends in norms, compute ``epilogue``."""
        for each in _in_list(child) or [child]:
            method = None if isinstance(each, DistNorm) else self._ending(each)
            if method is None:
                assert isinstance(each, DistNorm)
                if epilogue:
                    each.epilogue = epilogue
            else:
                self._given[each] = method
                for name in method.last:
                    self._give(each.get_submodule(name), epilogue)

    def _takes_epilogue(self, child: object) -> bool:
        return is_norm(child) or (isinstance(child, nn.Module) and self._ending(child) is not None)

    def _ending(self, module: nn.Module) -> _Method | None:
        """Return how ``module`` takes the epilogue of the norm that it ends in; None if it does not."""
        if module not in self._endings:
            self._endings[module] = None  # while it is looked for, if a module contains itself
            self._endings[module] = self._find_ending(module)
        return self._endings[module]

    def _find_ending(self, module: nn.Module) -> _Method | None:
        base = underlying(module)
        if isinstance(module, DistNorm) or not module._modules or not is_unobserved(module):
            return None
        if is_sequence(base):
            children = list(module._modules.values())
            at = last(children)
            if at is None or not self._takes_epilogue(children[at]):
                return None
            return _Method(FORWARD, Attributes(), {}, frozenset([list(module._modules)[at]]))
        attributes = self._attributes(module)
        if not isinstance(base.forward, FunctionType) or not _concern(base.forward, attributes):
            return None
        found = find(base, FORWARD, attributes).found
        return _Method(FORWARD, found.required(attributes), {}, frozenset(found.last)) if found.last else None

    def _methods(self, module: nn.Module) -> list[_Method]:
        """Return the methods of ``module`` with fused versions. One in the instance's dict has precedence."""
        base = underlying(module)
        found = self._in_sequence(module) if is_sequence(base) else self._in_class(module, base)
        return [each for each in found if each.name not in vars(module)]

    def _in_sequence(self, module: nn.Module) -> Iterator[_Method]:
        children = list(module._modules.values())
        tails = ((name, following(children, at, self._takes_epilogue)[1]) for at, name in enumerate(module._modules))
        epilogues = {name: activation.name for name, activation in tails if activation is not None}
        if epilogues:
            yield _Method("forward", Attributes(), epilogues)

    def _in_class(self, module: nn.Module, base: type[nn.Module]) -> Iterator[_Method]:
        attributes = self._attributes(module)
        for name, function in _functions(base) if attributes != Attributes() else ():
            if _concern(function, attributes):
                found = find(base, name, attributes).found
                if found.epilogues:
                    yield _Method(name, found.required(attributes), found.epilogues)

    def _attributes(self, module: nn.Module) -> Attributes:
        children = {name: child for name, child in module._modules.items() if getattr(module, name) is child}
        there = {name: child for name, child in children.items() if child is not None}
        norms = frozenset(name for name, child in there.items() if is_norm(child))
        lists = frozenset(name for name, each in there.items() if _in_list(each) and all(map(is_norm, _in_list(each))))
        endings = frozenset(name for name, child in there.items() if self._ending(child) is not None)
        if not norms | lists | endings:
            return Attributes()
        return Attributes(
            norms=norms,
            lists=lists,
            activations=frozenset((name, each.name) for name, child in there.items() if (each := activation_of(child))),
            identities=frozenset(name for name, child in there.items() if is_identity(child)),
            flags=frozenset(_flags(module)),
            endings=endings,
            quiet=frozenset(name for name, child in there.items() if has_no_effects(child)),
            present=frozenset(there),
        )


def _concern(function: FunctionType, attributes: Attributes) -> bool:
    """Return whether ``function`` names any norm."""
    return not (attributes.norms | attributes.lists | attributes.endings).isdisjoint(_names(function))


def _flags(module: nn.Module) -> Iterator[tuple[str, bool | None]]:
    for name, value in (*vars(module).items(), *module._modules.items()):
        if (value is None or value is True or value is False) and name != "training":
            yield name, value


def _in_list(child: nn.Module) -> list[nn.Module]:
    """Return the modules in ``child``, if it is a list."""
    return list(child) if type(child) is nn.ModuleList else []


def _functions(cls: type[nn.Module]) -> Iterator[tuple[str, FunctionType]]:
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
