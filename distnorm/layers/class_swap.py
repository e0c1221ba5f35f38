"""Swap the class of a module in place, also under classes that tools have put on top of it.

FSDP2 makes ``FSDPConv2d(FSDPModule, Conv2d)`` at run time and gives that class to the module that it shards, and
``torch.nn.utils.parametrize`` makes ``ParametrizedConv2d(Conv2d)``, whose properties compute the tensors (torch 2.13;
tests/test_private_apis.py and tests/integrations/test_fsdp_wrapper.py fail when that changes). Such a class stands for
the one it was made from, and is made again on top of another.
"""

from __future__ import annotations

import sys

from torch import nn

_OF_THE_CLASS_ITSELF = ("__dict__", "__weakref__")


def underlying(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` as it was before tools of torch's put theirs on top, or as it is."""
    cls = type(module)
    while _is_made(cls):
        cls = cls.__bases__[-1]
    return cls


def swap(module: nn.Module, target: type[nn.Module]) -> None:
    """Give ``module`` the class ``target``, and on top of it what tools had put on top of its own."""
    module.__class__ = _made_again(type(module), target)


def _made_again(cls: type[nn.Module], target: type[nn.Module]) -> type[nn.Module]:
    if not _is_made(cls):
        return target
    *mixins, base = cls.__bases__
    target = _made_again(base, target)
    own = {name: value for name, value in vars(cls).items() if name not in _OF_THE_CLASS_ITSELF}
    prefix = cls.__name__.removesuffix(base.__name__)
    return type(f"{prefix}{target.__name__}", (*mixins, target), own)


# docs/decisions.md#classes-that-tools-create
def _is_made(cls: type[nn.Module]) -> bool:
    """Whether ``cls`` was made at run time, on top of one that does the work.

    It says that it is torch's, which has no class of that name, and its ``forward`` is not its own, as that of
    torch.fx's graphs is.
    """
    named = hasattr(sys.modules.get(cls.__module__), cls.__name__)
    return cls.__module__.startswith("torch.") and not named and "forward" not in vars(cls)
