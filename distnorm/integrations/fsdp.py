"""FSDP2 in unmodified scripts: ``fully_shard`` converts the modules that it shards.

Scripts shard the parts of a model first and the whole model last. With one conversion per part, moving statistics would
need one collective per part. So each call undoes the conversions of the parts inside its module and converts the module
as a whole, which is only a class swap. The last call, on the whole model, gives the final conversion.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.hooks import RemovableHandle

from distnorm import messages
from distnorm.attach import conversions_of
from distnorm.convert import undo
from distnorm.layers.conversion import Conversion
from distnorm.layers.module import DistNorm
from distnorm.patterns import of_model
from distnorm.settings import Settings, as_it_is


def wrap_fully_shard(settings: Settings) -> Callable[[], None]:
    """Let ``torch.distributed.fsdp.fully_shard`` convert modules before it shards them; return a function to undo this.

    Statistics are shared over the mesh given to ``fully_shard``: over the axes of ``dp_mesh_dims`` if given, else over
    all axes, such as both of a replicate x shard mesh. Without a mesh, they are shared over all ranks. Patterns of
    ``settings.where`` match names within the outermost module that is sharded. A model that the script itself converts
    is skipped. Issues no collective.

    Call it before the script imports ``fully_shard`` by name.

    Warns:
        UserWarning: on the first rank, at the first forward pass of an outermost module that cannot be converted.
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
        earlier = {each for each in earlier if not each.is_provisional}
        if not earlier <= set(self.made):
            return  # conversions by the script have precedence
        if of_model(self.settings.where, whole) is None:
            return  # so have those of parts that are named
        if earlier:
            undo(whole)
        for each in whole.modules():
            if each in self.watched:
                self.watched.pop(each).remove()
        reason = self.settings.attempt(whole, mesh=mesh)
        if reason is None:
            self.made.update(conversions_of(whole))
        elif reason:
            self._watch(module[0] if isinstance(module, list) else module, reason)

    def _watch(self, module: nn.Module, reason: str) -> None:
        """Warn when ``module`` runs, unless a later call shards a module that contains it."""

        def warn(*_: Any) -> None:
            self.watched.pop(module).remove()
            messages.warn(f"{as_it_is(module, reason)}. It is the outermost module given to fully_shard.")

        self.watched[module] = module.register_forward_pre_hook(warn)


def _data_mesh(mesh: DeviceMesh | None, dims: fsdp.DataParallelMeshDims | None) -> DeviceMesh | None:
    """Return the data-parallel axes of ``mesh``: those that ``dims`` names, else all."""
    if mesh is None or dims is None:
        return mesh
    names = [*dims.replicate_names, *dims.shard_names]
    return mesh[tuple(name for name in mesh.mesh_dim_names or () if name in names)]


def _replace(current: object, new: object) -> None:
    """Replace ``current`` by ``new`` in all modules of torch.distributed, since old import paths hold it too."""
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.distributed.") and getattr(module, "fully_shard", None) is current:
            module.fully_shard = new  # type: ignore[attr-defined]
