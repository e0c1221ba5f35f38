"""Swap the class of a module in place, also under a wrapper that has swapped it before.

FSDP2 makes ``FSDPConv2d(FSDPModule, Conv2d)`` at run time and gives that class to the module that it shards (torch
2.13; tests/integrations/test_fsdp.py fails when that changes). Such a class stands for the one it was made from.
"""

from __future__ import annotations

from torch import nn


def underlying(module: nn.Module) -> type[nn.Module]:
    """The class of ``module`` as it was before FSDP2 wrapped it, or as it is."""
    cls = type(module)
    return cls.__bases__[1] if _is_wrapped(cls) else cls


def swap(module: nn.Module, target: type[nn.Module]) -> None:
    """Give ``module`` the class ``target``, and FSDP2's part on top of it if there was one."""
    cls = type(module)
    if _is_wrapped(cls):
        prefix = cls.__name__.removesuffix(cls.__bases__[1].__name__)
        own = {"__deepcopy__": vars(cls)["__deepcopy__"]}
        target = type(f"{prefix}{target.__name__}", (cls.__bases__[0], target), own)
    module.__class__ = target


def _is_wrapped(cls: type[nn.Module]) -> bool:
    # By the module that the first base comes from: importing FSDP2 takes a second.
    return len(cls.__bases__) == 2 and cls.__bases__[0].__module__.startswith("torch.distributed.")
