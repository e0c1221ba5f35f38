"""Recognize converted layers by their values among the tensors that a script saves or loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from distnorm.layers.conversion import Conversion
from distnorm.layers.module import DistNorm
from distnorm.layers.running_statistics import buffers_of

_DEPTH = 6
"""How deep the tensors of a model may lie in what is saved."""

_LONG = 1000
"""Longer sequences are data, not models."""

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of names that come from DistributedDataParallel, ``torch.compile`` and other wrappers."""


def tensors_in(tree: object) -> dict[str, Tensor]:
    """Return the tensors in nested mappings, lists and tuples by the keys that lead to them, without wrappers' names.

    A module has those of its converted layers. Issues no collective.
    """
    return {_bare(*path): each for path, each in _walk(tree, ())}


def _walk(tree: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, nn.Module):
        for name, layer in tree.named_modules():
            if isinstance(layer, DistNorm):
                yield from (((*path, name, key), value) for key, value in _values(layer).items())
    elif isinstance(tree, Mapping | list | tuple) and len(path) < _DEPTH:
        sequence = enumerate(tree) if len(tree) <= _LONG else ()
        for key, branch in tree.items() if isinstance(tree, Mapping) else sequence:
            yield from _walk(branch, (*path, str(key)))


def _bare(*names: str) -> str:
    return ".".join(part for name in names for part in name.split(".") if part and part not in _WRAPPERS)


def values_of(conversion: Conversion) -> dict[str, Tensor]:
    """Return by name the parameters and running statistics of the layers, as a ``state_dict`` has them.

    Waits for collectives in flight.
    """
    layers = [(name, layer) for name, layer in conversion.layers() if isinstance(layer, DistNorm)]
    return {_bare(name, key): each for name, layer in layers for key, each in _values(layer).items()}


def _values(layer: DistNorm) -> dict[str, Tensor]:
    """Return what matters of the layer's ``state_dict``. That itself has hooks of engines: FSDP2's shard parameters."""
    buffers = {name: getattr(layer, name) for name in buffers_of(layer)}
    found = {**dict(layer.named_parameters()), **buffers, **layer._ahead()}
    # Some scripts leave out num_batches_tracked.
    return {name: each for name, each in found.items() if each is not None and each.is_floating_point()}


def is_named_in(conversion: Conversion, tensors: Mapping[str, Tensor]) -> bool:
    """Return whether ``tensors`` has a name of the first layer; nothing is waited for."""
    for name, layer in conversion.layers():
        for key, _ in chain(layer.named_parameters(), layer.named_buffers()):
            return any(_ends_with(each, _bare(name, key)) for each in tensors)
    return False


def place_of(values: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str | None:
    """Return the prefix under which ``tensors`` has all of ``values``; None if it has not. Casts do not matter."""
    for first in list(values)[:1]:
        for name in tensors:
            prefix = name.removesuffix(first)
            if _ends_with(name, first) and has_all(values, tensors, prefix):
                return prefix
    return None


def _ends_with(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def has_all(values: Mapping[str, Tensor], tensors: Mapping[str, Tensor], prefix: str = "") -> bool:
    """Return whether ``tensors`` has all of ``values`` under names that begin with ``prefix``."""
    found = {_alike(each, tensors.get(prefix + name)) for name, each in values.items()}
    return True in found and False not in found


def _alike(one: Tensor, other: Tensor | None) -> bool | None:
    """Return whether the values are equal, if need be after a cast of either; None if they cannot be compared."""
    if other is None or one.shape != other.shape:
        return False
    if not (_is_plain(one) and _is_plain(other)):
        return None
    mine, theirs = one.detach().cpu(), other.detach().cpu()
    pairs = (mine.to(theirs.dtype), theirs), (theirs.to(mine.dtype), mine)
    return any(torch.equal(cast.double(), given.double()) for cast, given in pairs)


def plain_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU, without tensors whose values are on several ranks."""
    return {name: each.detach().cpu().clone() for name, each in tensors.items() if _is_plain(each)}


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.layout == torch.strided
