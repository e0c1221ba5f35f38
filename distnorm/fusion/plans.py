"""Whether the fused version of a method applies to a module as it is now, and modules that end in a norm.

Such a module returns the output of a norm as it is: ``nn.Sequential(conv, norm)``, or one whose code ends in ``return
self.norm(x)``. What its caller does with that is an epilogue of the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import is_
from types import MethodType
from typing import Any

from torch import Tensor, nn

from distnorm.compat.dispatch_state import is_unobserved
from distnorm.fusion.ast import FORWARD
from distnorm.fusion.reading import Attributes, Found
from distnorm.fusion.source import rewrite
from distnorm.kernels import stock
from distnorm.layers.activations import activation_name, activation_of, has_no_effects, is_identity
from distnorm.layers.known_norms import Activated
from distnorm.layers.module import DistNorm
from distnorm.layers.one_function import functions_at
from distnorm.layers.small import may_be_repeated
from distnorm.types import RELU, Activation

_ABSENT = object()
"""Accepted by no check."""
_CALL, _SEQUENTIAL = nn.Module.__call__, nn.Sequential.forward


class Plan:
    """The original and the fused version of a method, and what the latter depends on."""

    def __init__(self, plain: Any, fused: Callable[..., Any], found: Found) -> None:
        self.plain, self.fused, self.found = plain, fused, found
        self._owners = tuple(found.owners)
        self.last = tuple(name.partition(".")[0] for name in found.last)
        self._checks: list[tuple[str, Callable[[Any], bool]]] = [
            *((name, are_norms) for name in found.owners),
            *((name, partial(_computes, name=each)) for name, each in found.activations.items()),
            *((name, is_identity) for name in found.identities),
            *((name, partial(is_, value)) for name, value in found.flags.items()),
            *((name, has_no_effects) for name in found.quiet),
            *((name, _is_module) for name in found.present if name not in found.owners),
        ]

    def is_valid_for(self, module: nn.Module) -> bool:
        """Return whether what ``module`` has is still what the fused version was compiled for."""
        cls, own, children = type(module), module.__dict__, module._modules
        for name, holds in self._checks:
            if name in children and name not in own and not hasattr(cls, name):
                value: Any = children[name]  # several times as fast as the attribute
            else:
                value = getattr(module, name, _ABSENT)
            if not holds(value):
                return False
        if not self.found.functions:
            return True
        names = self.plain.__globals__
        return all(next(functions_at(path, names), None) == each for path, each in self.found.functions.items())

    # docs/decisions.md#small-fused-modules-run-as-they-were-written
    def saves_nothing(self, module: nn.Module, args: tuple[object, ...]) -> bool:
        """Return whether the norms that the fused version merges are so small that its checks take more than it saves.

        They were in their last forward, and ``args`` are not larger. The original version is right for any size.
        """
        for each in args:
            if is_large(each):
                return False
        children = module._modules
        if self.fused is _run_in_sequence:
            merged = [each for each in children.values() if isinstance(each, DistNorm) or hasattr(type(each), FORWARD)]
        else:
            merged = [children.get(name) for name in self._owners]
        return all(map(was_small, merged)) and not may_be_repeated()


def find(cls: type[nn.Module], name: str, attributes: Attributes) -> Plan:
    """Return both versions of the method ``name`` of ``cls``; ``FORWARD`` is that of ``forward`` with an epilogue."""
    plain: Any = cls.forward if name == FORWARD else getattr(cls, name)
    if plain is _SEQUENTIAL:
        return Plan(plain, _run_in_sequence, Found())
    return Plan(plain, *(rewrite(plain, attributes, opens=name == FORWARD) or (plain, Found())))


# docs/decisions.md#a-child-that-ends-in-a-norm-has-a-second-forward
class Ending:
    """Descriptor of ``FORWARD``. Who calls it must have asked ``takes_epilogue``, which asks for all that is below."""

    def __init__(self, cls: type[nn.Module], plan: Plan) -> None:
        self._plan, self._as_read, self._code = plan, cls.forward, plan.plain.__code__

    def __get__(self, module: nn.Module | None, owner: type[nn.Module] | None = None) -> Any:
        return self if module is None else MethodType(self._plan.fused, module)

    def is_valid_for(self, module: nn.Module) -> bool:
        """Return whether calling ``module`` does what its class was read to do, and ends in a norm."""
        cls, plan = type(module), self._plan
        as_read = cls.forward is self._as_read and plan.plain.__code__ is self._code
        called = cls.__call__ is _CALL and module._compiled_call_impl is None
        if not (as_read and called and is_unobserved(module)):
            return False
        if plan.last:
            return plan.is_valid_for(module)
        return plan.fused is _run_in_sequence and takes_epilogue(_last_of(module))

    def was_small(self, module: nn.Module) -> bool:
        """Return whether the norm that ``module`` ends in was small in its last forward."""
        if self._plan.last:
            return all(was_small(module._modules.get(name)) for name in self._plan.last)
        return self._plan.fused is _run_in_sequence and was_small(_last_of(module))


def _last_of(sequence: Any) -> nn.Module | None:
    """Return the last child of ``sequence`` that does something."""
    children = list(sequence)
    at = last(children)
    return None if at is None else children[at]


def is_large(value: object) -> bool:
    """Return whether ``value`` is a tensor that is too large for torch's batch norm."""
    return isinstance(value, Tensor) and value.numel() > stock.FEW_VALUES


def was_small(child: object) -> bool:
    """Return whether the norm that ``child`` is, or ends in, was small in its last forward; of a list, all of them."""
    if isinstance(child, DistNorm):
        return child._site.small is not None
    if type(child) is nn.ModuleList:
        return all(map(was_small, child))
    ending = getattr(type(child), FORWARD, None)
    return isinstance(ending, Ending) and isinstance(child, nn.Module) and ending.was_small(child)


def takes_epilogue(child: object) -> bool:
    """Return whether ``child`` is a norm, or ends in one, and takes its epilogue."""
    ending = None if isinstance(child, DistNorm) else getattr(type(child), FORWARD, None)
    return is_norm(child) if ending is None else isinstance(child, nn.Module) and ending.is_valid_for(child)


def are_norms(child: object) -> bool:
    """Return whether ``child`` takes an epilogue, or is a list of norms."""
    return all(map(is_norm, child)) if type(child) is nn.ModuleList else takes_epilogue(child)


def is_norm(child: object) -> bool:
    """Return whether ``child`` is a converted norm that can compute an epilogue, and has no hooks."""
    if not isinstance(child, DistNorm) or not is_unobserved(child):
        return False
    forward = type(child).forward
    if forward is DistNorm.forward:
        return True
    return isinstance(child, Activated) and forward is Activated.forward and child.only_normalizes()


def _computes(child: object, name: str) -> bool:
    return activation_name(child) == name


def _is_module(child: object) -> bool:
    return isinstance(child, nn.Module)


# --- sequences -----------------------------------------------------------------------------------


def _run_in_sequence(module: nn.Sequential, input: Any, **epilogue: Any) -> Any:
    """Run as ``nn.Sequential.forward``, but let norms compute the activation that follows, and the last one more."""
    children: list[Any] = list(module)
    end = last(children) if epilogue else None
    at, repeatable = 0, may_be_repeated()
    while at < len(children):
        child, after, activation = children[at], at + 1, None
        normalizes = isinstance(child, DistNorm)
        norm = normalizes or hasattr(type(child), FORWARD)
        if norm and (repeatable or is_large(input) or not was_small(child)):
            after, activation = following(children, at, takes_epilogue)
        if at == end:
            given = epilogue
        elif activation is None:
            given, after = {}, at + 1
        elif activation is RELU:
            given = {"relu": True}
        else:
            given = {"activation": activation.name, "parameter": activation.parameter}
        input = child(input, **given) if normalizes or not given else getattr(child, FORWARD)(input, **given)
        at = after
    return input


def last(children: Sequence[nn.Module | None]) -> int | None:
    """Return the place of the last child that does something; None if none does."""
    return next((at for at in reversed(range(len(children))) if not is_identity(children[at])), None)


def following(
    children: Sequence[nn.Module | None], at: int, takes: Callable[[object], bool]
) -> tuple[int, Activation | None]:
    """Return the activation that follows a norm at ``at``, also behind layers that do nothing, and the place behind it.

    None if there is no such activation, or ``takes`` says that there is no norm.
    """
    if takes(children[at]):
        for after in range(at + 1, len(children)):
            activation = activation_of(children[after])
            if activation is not None or not is_identity(children[after]):
                return after + 1, activation
    return at + 1, None
