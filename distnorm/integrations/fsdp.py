"""FSDP2 in scripts that stay as they are: ``fully_shard`` converts what it shards.

Scripts shard the parts of a model first and the whole last. A conversion per part would cost moving statistics one
collective per part, so each call undoes the conversions of the parts inside it and makes one of the whole. Both are
local class swaps; the last call, on the whole, decides.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from distnorm.attach import conversions_of
from distnorm.convert import undo
from distnorm.layers.conversion import Conversion
from distnorm.layers.module import DistNorm
from distnorm.settings import Settings


def wrap_fully_shard(settings: Settings) -> Callable[[], None]:
    """Let ``torch.distributed.fsdp.fully_shard`` convert by ``settings`` just before it shards; returns what undoes it.

    Statistics are shared over the mesh that ``fully_shard`` is given: both axes of a replicate x shard mesh, the axes
    of ``dp_mesh_dims`` where that is given, all ranks where there is no mesh. Patterns of ``settings.where`` are names
    within the outermost module that is sharded. A model that the script converts itself is left alone. No collective.

    Call it before the script imports ``fully_shard`` by name.

    Raises:
        ValueError: in ``fully_shard``, for layers that cannot be converted, as ``distnorm.convert``.

    Warns:
        UserWarning: at the first forward of an outermost module of which ``settings.where`` selects nothing.
    """
    original = fsdp.fully_shard
    converter = _Converter(settings)

    @functools.wraps(original)
    def fully_shard(module: nn.Module | list[nn.Module], **options: Any) -> Any:
        converter.convert(module, _data_mesh(options.get("mesh"), options.get("dp_mesh_dims")))
        return original(module, **options)

    _replace(original, fully_shard)
    return lambda: _replace(fully_shard, original)


class _Converter:
    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.made: WeakSet[Conversion] = WeakSet()
        self.watched: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()

    def convert(self, module: nn.Module | list[nn.Module], mesh: DeviceMesh | None) -> None:
        whole = nn.ModuleList(module) if isinstance(module, list) else module
        earlier = {each._site.conversion for each in whole.modules() if isinstance(each, DistNorm)}
        if not earlier <= set(self.made):
            return  # the script's own conversions come first
        undo(whole)
        for each in whole.modules():
            if each in self.watched:
                self.watched.pop(each).remove()
        names = [name for name, each in whole.named_modules() if isinstance(each, _BatchNorm)]
        if names and self.settings.where and not _select(self.settings.where, names):
            self._watch(module[0] if isinstance(module, list) else module, names)
        elif self.settings.convert(whole, mesh=mesh):
            self.made.update(conversions_of(whole))

    def _watch(self, module: nn.Module, names: list[str]) -> None:
        """Warn when ``module`` runs and no later call has contained it."""

        def warn(*_: Any) -> None:
            self.watched.pop(module).remove()
            warnings.warn(
                f"{self.settings.source}: where={list(self.settings.where)} selects none of {names}, the norm layers "
                f"of {type(module).__name__}, the outermost module given to fully_shard; they are as they were. Name "
                "layers as that module does.",
                stacklevel=2,
            )

        self.watched[module] = module.register_forward_pre_hook(warn)


def _select(patterns: Sequence[str], names: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _data_mesh(mesh: DeviceMesh | None, dims: fsdp.DataParallelMeshDims | None) -> DeviceMesh | None:
    """The axes of ``mesh`` that hold different data: all of them, unless ``dims`` names some."""
    if mesh is None or dims is None:
        return mesh
    names = [*dims.replicate_names, *dims.shard_names]
    return mesh[tuple(name for name in mesh.mesh_dim_names or () if name in names)]


def _replace(current: object, new: object) -> None:
    """Put ``new`` wherever torch.distributed holds ``current``: its old import paths hold copies."""
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.distributed.") and getattr(module, "fully_shard", None) is current:
            module.fully_shard = new  # type: ignore[attr-defined]
