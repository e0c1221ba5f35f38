"""Keep DistributedDataParallel from broadcasting running statistics that agree already.

By default DDP broadcasts all buffers in every iteration (pytorch#46636). The only user of DDP's private list of names
to ignore (torch 2.13; see tests/test_private_apis.py), which DDP reads when it wraps a model.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from distnorm.running import BUFFERS

_ATTRIBUTE = "_ddp_params_and_buffers_to_ignore"


def ignore_buffers(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """List the running statistics of ``layers`` for DDP to leave alone once it wraps ``model``."""
    listed = list(getattr(model, _ATTRIBUTE, ()))
    there = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    setattr(model, _ATTRIBUTE, listed + [name for name in _names(model, layers) if name in there - set(listed)])


def heed_buffers(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Undo ``ignore_buffers``, keeping what others listed."""
    for part in model.modules():
        ours = set(_names(part, layers)) if _ATTRIBUTE in vars(part) else set()
        listed = [name for name in getattr(part, _ATTRIBUTE, ()) if name not in ours]
        if listed:
            setattr(part, _ATTRIBUTE, listed)
        elif ours:
            delattr(part, _ATTRIBUTE)


def _names(model: nn.Module, layers: Sequence[nn.Module]) -> list[str]:
    ours = {id(layer) for layer in layers}
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in model.named_modules()
        if id(layer) in ours
        for name in BUFFERS
    ]
