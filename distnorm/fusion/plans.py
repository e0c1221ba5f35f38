"""Whether the fused version of a method applies to a module as it is now, and modules that end in a norm.

Such a module returns the output of a norm as it is: ``nn.Sequential(conv, norm)``, or one whose code ends in ``return
self.norm(x)``. What its caller does with that is an epilogue of the norm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

from distnorm.fusion.ast import FORWARD
from distnorm.fusion.reading import Attributes, Found
from distnorm.fusion.source import rewrite
from distnorm.layers.activations import activation_of, has_no_effects, is_identity, is_unobserved
from distnorm.layers.known_norms import Activated
from distnorm.layers.module import DistNorm
from distnorm.layers.one_function import functions_at
from distnorm.types import RELU, Activation


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
            and all(has_no_effects(getattr(module, name, None)) for name in found.quiet)
            and all(isinstance(getattr(module, name, None), nn.Module) for name in found.present)
        )


def find(cls: type[nn.Module], name: str, attributes: Attributes) -> Plan:
    """Return both versions of the method ``name`` of ``cls``; ``FORWARD`` is that of ``forward`` with an epilogue."""
    plain: Any = cls.forward if name == FORWARD else getattr(cls, name)
    if plain is nn.Sequential.forward:
        return Plan(plain, _run_in_sequence, Found())
    return Plan(plain, *(rewrite(plain, attributes, opens=name == FORWARD) or (plain, Found())))


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
        called = cls.__call__ is nn.Module.__call__ and module._compiled_call_impl is None
        if not (as_read and called and is_unobserved(module)):
            return False
        return plan.is_valid_for(module) if plan.found.last else _last_takes_epilogue(list(module._modules.values()))


def _last_takes_epilogue(children: list[nn.Module | None]) -> bool:
    at = last(children)
    return at is not None and takes_epilogue(children[at])


def takes_epilogue(child: object) -> bool:
    """Return whether ``child`` is a norm, or ends in one, and takes its epilogue."""
    ending = getattr(type(child), FORWARD, None)
    return is_norm(child) if ending is None else isinstance(child, nn.Module) and ending.is_valid_for(child)


def are_norms(child: object) -> bool:
    """Return whether ``child`` takes an epilogue, or is a list of norms."""
    return all(map(is_norm, child)) if type(child) is nn.ModuleList else takes_epilogue(child)


def is_norm(child: object) -> bool:
    """Return whether ``child`` is a converted norm that can compute an epilogue, and has no hooks."""
    if not isinstance(child, DistNorm) or not is_unobserved(child):
        return False
    forward = type(child).forward
    alone = isinstance(child, Activated) and forward is Activated.forward and child.only_normalizes()
    return alone or forward is DistNorm.forward


def _is_called(child: object, activation: str) -> bool:
    found = activation_of(child)
    return found is not None and found.name == activation


# --- sequences -----------------------------------------------------------------------------------


def _run_in_sequence(module: nn.Sequential, input: Any, **epilogue: Any) -> Any:
    """Run as ``nn.Sequential.forward``, but let norms compute the activation that follows, and the last one more."""
    children = list(module)
    end = last(children) if epilogue else None
    at = 0
    while at < len(children):
        follower, activation = following(children, at, takes_epilogue)
        if at == end:
            input = _call(children[at], input, **epilogue)
        elif activation is None:
            input, follower = children[at](input), at + 1
        elif activation == RELU:
            input = _call(children[at], input, relu=True)
        else:
            input = _call(children[at], input, activation=activation.name, parameter=activation.parameter)
        at = follower
    return input


def _call(norm: nn.Module, input: Any, **epilogue: Any) -> Any:
    return getattr(norm, FORWARD, norm)(input, **epilogue)


def last(children: Sequence[nn.Module | None]) -> int | None:
    """Return the place of the last child that does something; None if none does."""
    return next((at for at in reversed(range(len(children))) if not is_identity(children[at])), None)


def following(
    children: Sequence[nn.Module | None], at: int, takes: Callable[[object], bool]
) -> tuple[int, Activation | None]:
    """Return the activation that follows a norm at ``at``, also behind layers that do nothing, and the place behind it.

    None if there is no such activation, or ``takes`` says that there is no norm.
    """
    after = next((i for i in range(at + 1, len(children)) if not is_identity(children[i])), at)
    activation = activation_of(children[after]) if after > at else None
    return after + 1, activation if activation is not None and takes(children[at]) else None
