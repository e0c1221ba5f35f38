"""Swap the class of a module in place, also under subclasses that tools have generated.

FSDP2 generates ``FSDPConv2d(FSDPModule, Conv2d)`` at run time for a module that it shards.
``torch.nn.utils.parametrize`` generates ``ParametrizedConv2d(Conv2d)``, whose properties compute the tensors (torch
2.13; tests/test_private_apis.py and tests/integrations/test_fsdp_wrapper.py fail when that changes). The class below a
generated one is swapped, and the generated one is created again on top of the new class.
"""

from __future__ import annotations

import sys

from torch import nn

_NOT_COPIED = ("__dict__", "__weakref__")
_MADE_WITH = "_made_with"


def underlying(module: nn.Module) -> type[nn.Module]:
    """Return the class of ``module``, without the subclasses that torch's tools have generated."""
    cls = type(module)
    while _is_generated(cls):
        cls = cls.__bases__[-1]
    return cls


def swap(module: nn.Module, target: type[nn.Module]) -> None:
    """Set the class of ``module`` to ``target``, under the same generated subclasses as before."""
    module.__class__ = _rebase(type(module), target)


def hand_down(cls: type, heir: type) -> None:
    """Move what was set on ``cls`` since it was made to ``heir``, the class that its modules are known by.

    ``type(module).count += 1`` in code that knows nothing of classes made at run time would be lost otherwise.
    """
    made_with = vars(cls)[_MADE_WITH]
    for name, value in list(vars(cls).items()):
        if not name.startswith("__") and name != _MADE_WITH and made_with.get(name, made_with) is not value:
            setattr(heir, name, value)
            delattr(cls, name)


def note_contents(cls: type) -> None:
    """Remember what ``cls`` was made with, for ``hand_down``."""
    setattr(cls, _MADE_WITH, dict(vars(cls)))


def _rebase(cls: type[nn.Module], target: type[nn.Module]) -> type[nn.Module]:
    if not _is_generated(cls):
        return target
    *mixins, base = cls.__bases__
    target = _rebase(base, target)
    attributes = {name: value for name, value in vars(cls).items() if name not in _NOT_COPIED}
    prefix = cls.__name__.removesuffix(base.__name__)
    return type(f"{prefix}{target.__name__}", (*mixins, target), attributes)


# docs/decisions.md#classes-that-tools-create
def _is_generated(cls: type[nn.Module]) -> bool:
    """Return whether a tool has generated ``cls`` at run time, as a subclass of the class that does the work.

    Its module is one of torch's, but that module has no class of this name. It does not define ``forward``, as the
    generated classes of torch.fx do.
    """
    is_in_module = hasattr(sys.modules.get(cls.__module__), cls.__name__)
    return cls.__module__.startswith("torch.") and not is_in_module and "forward" not in vars(cls)
